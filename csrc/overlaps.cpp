#include "overlaps.h"

#include <algorithm>
#include <numeric>

namespace fusedstep {

std::vector<std::pair<size_t, size_t>> Overlaps::find(const std::vector<const Plan*>& plans,
                                                      const std::vector<Extent>& others) {
  extents_.clear();
  for (const Plan* plan : plans) {
    for (size_t i = 0; i < plan->size(); ++i) {
      const Record& record = plan->records()[i];
      const auto begin = reinterpret_cast<uintptr_t>(plan->active(i) ? plan->grad(i) : nullptr);
      const auto bytes = static_cast<uintptr_t>(record.numel * size_of(record.grad_dtype));
      extents_.emplace_back(begin, begin == 0 ? 0 : begin + bytes);
    }
  }
  extents_.insert(extents_.end(), others.begin(), others.end());
  if (order_.size() != extents_.size()) {
    order_.resize(extents_.size());
    std::iota(order_.begin(), order_.end(), size_t{0});
  }
  const auto before = [this](size_t a, size_t b) { return extents_[a] < extents_[b]; };
  if (!std::is_sorted(order_.begin(), order_.end(), before)) std::sort(order_.begin(), order_.end(), before);

  std::vector<bool> shares(extents_.size(), false);
  const Extent nothing{0, 0};
  const Extent* furthest = &nothing;  // of those so far, what ends last
  bool any = false;
  for (const size_t i : order_) {
    const Extent& extent = extents_[i];
    if (extent.first == extent.second) continue;
    if (extent.first < furthest->second) any = shares[i] = shares[furthest - extents_.data()] = true;
    if (extent.second > furthest->second) furthest = &extent;
  }
  std::vector<std::pair<size_t, size_t>> found;
  if (!any) return found;
  size_t at = 0;
  for (size_t p = 0; p < plans.size(); ++p) {
    for (size_t i = 0; i < plans[p]->size(); ++i, ++at) {
      if (shares[at]) found.emplace_back(p, i);
    }
  }
  return found;
}

}  // namespace fusedstep

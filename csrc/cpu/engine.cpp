// The loop over elements, compiled once per instruction set (FUSEDSTEP_ISA). It knows dtypes and tails, but no
// optimizer by name and no threads.
#include "engine.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {
namespace {

constexpr int64_t kTile = 512;  // elements converted at a time: five float tiles stay in the L1 cache

template <class T>
constexpr Dtype kDtypeOf = sizeof(T) == 8 ? Dtype::kF64 : Dtype::kF32;

template <class T, class S>
void widen_tile(const void* from, int64_t offset, int64_t n, T* __restrict to) {
  const S* __restrict source = static_cast<const S*>(from) + offset;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = load<T>(source[i]);
}

template <class T, class S>
void narrow_tile(void* to, int64_t offset, int64_t n, const T* __restrict from) {
  S* __restrict target = static_cast<S*>(to) + offset;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) target[i] = narrow<S>(from[i]);
}

// Elements [offset, offset + n) in the arithmetic type: in place where they are stored so, else converted into buffer.
template <class T>
T* open_tile(void* data, Dtype dtype, int64_t offset, int64_t n, T* buffer) {
  if (dtype == kDtypeOf<T>) return static_cast<T*>(data) + offset;
  switch (dtype) {
    case Dtype::kF32:
      widen_tile<T, float>(data, offset, n, buffer);
      break;
    case Dtype::kBF16:
      widen_tile<T, BF16>(data, offset, n, buffer);
      break;
    case Dtype::kF16:
      widen_tile<T, F16>(data, offset, n, buffer);
      break;
    case Dtype::kF64:
      widen_tile<T, double>(data, offset, n, buffer);
      break;
  }
  return buffer;
}

template <class T>
void close_tile(void* data, Dtype dtype, int64_t offset, int64_t n, const T* tile) {
  if (dtype == kDtypeOf<T>) return;  // was updated in place
  switch (dtype) {
    case Dtype::kF32:
      return narrow_tile<T, float>(data, offset, n, tile);
    case Dtype::kBF16:
      return narrow_tile<T, BF16>(data, offset, n, tile);
    case Dtype::kF16:
      return narrow_tile<T, F16>(data, offset, n, tile);
    case Dtype::kF64:
      return narrow_tile<T, double>(data, offset, n, tile);
  }
}

template <class Rule, class T, class Scalars>
void update_tile(T* __restrict param, const T* __restrict grad, T* const* states, int64_t n, const Scalars& scalars) {
  const Scalars s = scalars;
  constexpr int kNamed = sizeof(Rule::kStateNames) / sizeof(Rule::kStateNames[0]);
  static_assert(kNamed <= 3, "add a branch for a rule with more states");
  T* __restrict a = Rule::kStates > 0 ? states[0] : nullptr;
  T* __restrict b = Rule::kStates > 1 ? states[1] : nullptr;
  T* __restrict c = Rule::kStates > 2 ? states[2] : nullptr;
  // States are named local references because an array of them would not vectorise.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T absent = T(0);
    T& s0 = Rule::kStates > 0 ? a[i] : absent;
    T& s1 = Rule::kStates > 1 ? b[i] : absent;
    T& s2 = Rule::kStates > 2 ? c[i] : absent;
    if constexpr (kNamed == 1) Rule::update(param[i], grad[i], s0, s);
    if constexpr (kNamed == 2) Rule::update(param[i], grad[i], s0, s1, s);
    if constexpr (kNamed == 3) Rule::update(param[i], grad[i], s0, s1, s2, s);
  }
}

template <class Rule, class T>
void update_range(const Call& call, const Work& work, int64_t offset, int64_t n,
                  const typename Rule::template Scalars<T>& scalars) {
  const Record& record = *work.record;
  alignas(64) T buffers[2 + kMaxStates][kTile];
  const bool change_grad = call.maximize || call.grad_scale != 1.0;
  bool in_place = record.param_dtype == kDtypeOf<T> && record.grad_dtype == kDtypeOf<T> && !change_grad;
  for (int k = 0; k < Rule::kStates; ++k) in_place = in_place && record.state_dtypes[k] == kDtypeOf<T>;
  const int64_t tile = in_place ? n : kTile;
  const T sign = call.maximize ? T(-1) : T(1);
  const T scale = static_cast<T>(call.grad_scale);

  for (const int64_t end = offset + n; offset < end; offset += tile) {
    const int64_t m = end - offset < tile ? end - offset : tile;
    T* param = open_tile<T>(record.param, record.param_dtype, offset, m, buffers[0]);
    T* grad = open_tile<T>(const_cast<void*>(work.grad), record.grad_dtype, offset, m, buffers[1]);
    if (change_grad) {
      const T* source = grad;
      grad = buffers[1];
#pragma GCC ivdep
      for (int64_t i = 0; i < m; ++i) grad[i] = sign * (source[i] / scale);
    }
    T* states[kMaxStates];
    for (int k = 0; k < Rule::kStates; ++k)
      states[k] = open_tile<T>(record.states[k], record.state_dtypes[k], offset, m, buffers[2 + k]);
    update_tile<Rule>(param, static_cast<const T*>(grad), states, m, scalars);
    close_tile<T>(record.param, record.param_dtype, offset, m, param);
    for (int k = 0; k < Rule::kStates; ++k)
      close_tile<T>(record.states[k], record.state_dtypes[k], offset, m, states[k]);
  }
}

// prepare() costs more than a small tensor's update, and most tensors of a group are at the same step.
template <class Rule, class T>
struct Prepared {
  int64_t step = -1;
  typename Rule::template Scalars<T> scalars;

  const auto& at(const Call& call, const Record& record) {
    const int64_t next = static_cast<int64_t>(*record.step) + 1;
    if (next != step) scalars = Rule::template prepare<T>(call.hyper, step = next);
    return scalars;
  }
};

template <class Rule>
void run_rule(const Call& call, int64_t first, int64_t last) {
  Prepared<Rule, float> single;
  Prepared<Rule, double> twice;
  int64_t low = 0, high = call.work_size;  // the last tensor that begins at or before `first`
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (call.work[middle].begin <= first ? low : high) = middle;
  }
  for (int64_t i = low; i < call.work_size && call.work[i].begin < last; ++i) {
    const Work& work = call.work[i];
    const int64_t from = first > work.begin ? first - work.begin : 0;
    const int64_t to = last - work.begin < work.record->numel ? last - work.begin : work.record->numel;
    if (from >= to) continue;
    if (work.record->param_dtype == Dtype::kF64)
      update_range<Rule, double>(call, work, from, to - from, twice.at(call, *work.record));
    else
      update_range<Rule, float>(call, work, from, to - from, single.at(call, *work.record));
  }
}

}  // namespace

void run(const Call& call, int64_t first, int64_t last) {
  visit_rule(call.rule, [&](auto rule) { run_rule<decltype(rule)>(call, first, last); });
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu

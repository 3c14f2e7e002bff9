#include "variant.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace fusedstep {
namespace {

template <class Rule>
bool matches(const std::string& name, const std::vector<std::string>& state_names, Variant* variant) {
  if (name != Rule::kName) return false;
  variant->n_hyper = static_cast<int>(std::size(Rule::kHyper));
  for (int k = 0; k < kNumNamed<Rule>; ++k) {
    if (has_state<Rule>(k)) variant->state_indices.push_back(k);
  }
  return std::equal(state_names.begin(), state_names.end(), variant->state_indices.begin(),
                    variant->state_indices.end(),
                    [](const std::string& given, int k) { return given == Rule::kStateNames[k]; });
}

}  // namespace

Variant find_variant(const std::string& name, const std::vector<std::string>& state_names) {
  for (int id = 0; id < static_cast<int>(RuleId::kCount); ++id) {
    Variant variant{false, id, 0, {}, {}, {}};
    const bool found = visit_rule(static_cast<RuleId>(id), [&](auto rule) {
      if (!matches<decltype(rule)>(name, state_names, &variant)) return false;
      for (const int k : variant.state_indices) variant.codes.push_back(decltype(rule)::kCodes[static_cast<size_t>(k)]);
      return true;
    });
    variant.spans.assign(variant.state_indices.size(), Span::kElement);
    if (found) return variant;
  }
  for (int id = 0; id < static_cast<int>(ReducingRuleId::kCount); ++id) {
    Variant variant{true, id, 0, {}, {}, {}};
    const bool found = visit_reducing_rule(static_cast<ReducingRuleId>(id), [&](auto rule) {
      if (!matches<decltype(rule)>(name, state_names, &variant)) return false;
      for (const int k : variant.state_indices) variant.spans.push_back(decltype(rule)::kSpans[k]);
      return true;
    });
    variant.codes.assign(variant.state_indices.size(), Code::kNone);
    if (found) return variant;
  }
  std::string states;
  for (const std::string& state : state_names) states += " " + state;
  throw std::invalid_argument("no rule '" + name + "' with these states:" + states);
}

RuleId find_rule(const std::string& name, const std::vector<std::string>& state_names) {
  const Variant variant = find_variant(name, state_names);
  if (variant.reduces) throw std::invalid_argument("the rule '" + name + "' reduces");
  return static_cast<RuleId>(variant.rule);
}

}  // namespace fusedstep

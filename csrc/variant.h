// A rule as a plan asks for it: by its name and the states that a parameter has.
#pragma once

#include <string>
#include <vector>

#include "reducing_rules.h"
#include "rules.h"

namespace fusedstep {

// What a plan needs to know of a rule of either kind.
struct Variant {
  bool reduces;
  int rule;  // a RuleId, or a ReducingRuleId
  int n_hyper;
  std::vector<int> state_indices;  // of the states that it has, among all that it names
  std::vector<Span> spans;         // of these; all kElement for an elementwise rule
  std::vector<Code> codes;         // of these; all kNone for a rule that reduces
};

// Throws std::invalid_argument if there is no rule of that name with these states.
Variant find_variant(const std::string& name, const std::vector<std::string>& state_names);

// The elementwise rule of that name with these states. Throws std::invalid_argument if there is none.
RuleId find_rule(const std::string& name, const std::vector<std::string>& state_names);

}  // namespace fusedstep

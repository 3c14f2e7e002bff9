#include "steps.h"

namespace fusedstep::cuda {

bool run_general(int rule, const Segment& segment, unsigned threads, const ManyArguments& a) {
  if (segment.format != kGeneral) return false;
  visit_rule(static_cast<RuleId>(rule), [&](auto r) { run_way<General<decltype(r)>>(segment, threads, a); });
  return true;
}

}  // namespace fusedstep::cuda

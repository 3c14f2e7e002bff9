// The CPU engine's own source, compiled for the rules of rules.h.
// clang-format off
#include "../../csrc/cpu/stored.h"
#include "rules.h"
#define visit_rule visit_own
#include "../../csrc/cpu/engine.cpp"
#include "../../csrc/cpu/tiles.cpp"
// clang-format on

void fusedstep::take_step(int rule, Record& record, void* grad, const double* hyper, int n_hyper) {
  const cpu::Work work{&record, grad, 0};
  cpu::Call call{};
  call.rule = static_cast<RuleId>(rule);
  for (int h = 0; h < n_hyper; ++h) call.hyper[h] = hyper[h];
  call.grad_scale = call.coefficient = 1.0;
  call.work = &work;
  call.work_size = 1;
  call.numel = record.numel;
  cpu::run(call, 0, record.numel);
  *record.step = next_counter(*record.step);
}

int main() {
  return fusedstep::check_all();
}

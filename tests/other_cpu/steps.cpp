// Steps of every elementwise rule in every format of weights and states, on numbers that depend on nothing but integer
// arithmetic; prints a hash of all that each has changed. Built for two processors, it must print the same. NaNs count
// as one number: processors differ in their bits.
#include <cstdio>
#include <string>

#include "../../csrc/cpu/engine.h"
#include "tensors.h"

using namespace fusedstep;

namespace {

double hyper_of(const std::string& name) {
  if (name == "lr" || name == "weight" || name == "eta") return 0.01;
  if (name == "beta1" || name == "momentum" || name == "alpha") return 0.9;
  if (name == "beta2" || name == "beta") return 0.99;
  if (name == "weight_decay" || name == "lr_decay" || name == "extra_l2") return 0.02;
  if (name == "eps") return 1e-8;
  if (name == "c_coef" || name == "d_coef") return 0.25;
  if (name == "decoupled_weight_decay" || name == "weight_decouple" || name == "rectify") return 1.0;
  return 0.0;
}

template <class Rule>
void run(RuleId id, const Format& format) {
  constexpr int64_t kSizes[] = {1, 15, 31, 33, 255, 257, 1111};
  Random random;
  uint64_t hash = 0xcbf29ce484222325u;
  for (const int64_t n : kSizes) {
    Tensor<Rule> tensor(format, n, random);
    for (int turn = 0; turn < 3; ++turn) {
      tensor.fill_grad(random);
      const cpu::Work work{&tensor.record, tensor.grad.data(), 0};
      cpu::Call call{};
      call.rule = id;
      int h = 0;
      for (const char* name : Rule::kHyper) call.hyper[h++] = hyper_of(name);
      call.grad_scale = turn == 1 ? 2.0 : 1.0;
      call.coefficient = 1.0;
      call.zero_grads = turn == 2;
      call.work = &work;
      call.work_size = 1;
      call.numel = n;
      cpu::step(call, 1);
      hash = hashed(tensor.grad, format.param, hash);
    }
    hash = tensor.hash_of_weight(hash);
    for (int k = 0; k < kNumNamed<Rule>; ++k) hash = tensor.hash_of_state(k, hash);
  }
  std::printf("%s %d, %s: %016llx\n", Rule::kName, static_cast<int>(id), format.name,
              static_cast<unsigned long long>(hash));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) cpu::set_isa(argv[1]);
  std::fprintf(stderr, "%s\n", cpu::isa().c_str());
  for (int id = 0; id < static_cast<int>(RuleId::kCount); ++id)
    for (const Format& format : kFormats)
      visit_rule(static_cast<RuleId>(id), [&](auto rule) { run<decltype(rule)>(static_cast<RuleId>(id), format); });
}

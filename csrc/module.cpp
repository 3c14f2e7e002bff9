// The Python module fusedstep._C: plans, the engines behind them, and a watch over the optimizer's own dictionaries.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "cpu/engine.h"
#include "cpu/reducing.h"
#include "cuda_bindings.h"
#include "norm_bindings.h"
#include "overlaps.h"
#include "plan.h"
#include "schedule.h"
#include "watch.h"

namespace fusedstep {
namespace {

// What a step of a plan is called with.
struct Given {
  double hyper[kMaxHyper];
  bool maximize;
  double grad_scale, coefficient;
  bool zero_grads, write_grads;
  double average_weight;
};

// This may run code of the interpreter.
void read_hyper(const Plan& plan, const py::tuple& hyper, double* numbers) {
  if (plan.device() != Device::kCpu && plan.has_memory()) throw std::invalid_argument("the plan is not on the CPU");
  if (static_cast<int>(hyper.size()) != plan.n_hyper()) throw std::invalid_argument("wrong number of hyperparameters");
  for (size_t k = 0; k < hyper.size(); ++k) numbers[k] = to_double(PyTuple_GET_ITEM(hyper.ptr(), k));
}

// What the CPU engine needs to know of a plan's step; `work` is the memory behind it.
cpu::Call cpu_call(const Plan& plan, const Given& given, std::vector<cpu::Work>* work) {
  cpu::Call call{plan.rule(),
                 {},
                 given.maximize,
                 given.grad_scale,
                 given.coefficient,
                 given.zero_grads,
                 given.write_grads,
                 given.average_weight,
                 nullptr,
                 0,
                 0};
  std::copy(std::begin(given.hyper), std::end(given.hyper), call.hyper);
  work->resize(plan.size());
  cpu::Work* next = work->data();
  const Record* const records = plan.records().data();
  for (size_t i = 0; i < plan.size(); ++i) {
    if (!plan.active(i)) continue;
    *next++ = cpu::Work{&records[i], plan.grad(i), call.numel};
    call.numel += records[i].numel;
  }
  call.work = work->data();
  call.work_size = next - work->data();
  return call;
}

cpu::ReducingCall cpu_reducing_call(const Plan& plan, const Given& given) {
  cpu::ReducingCall call{plan.reducing_rule(),
                         {},
                         given.maximize,
                         given.grad_scale,
                         given.coefficient,
                         given.zero_grads,
                         given.write_grads,
                         given.average_weight,
                         {},
                         0};
  std::copy(std::begin(given.hyper), std::end(given.hyper), call.hyper);
  for (size_t i = 0; i < plan.size(); ++i) {
    if (!plan.active(i)) continue;
    call.work.push_back(cpu::ReducingWork{&plan.records()[i], &plan.matrices()[i], plan.grad(i)});
    call.numel += plan.records()[i].numel;
  }
  return call;
}

// Updates what a plan has gathered. undisturbed: all plans of this step are so, and since they have gathered, this has
// neither returned to the interpreter nor let its lock go.
void update(Plan& plan, const Given& given, bool undisturbed, int threads) {
  if (!undisturbed) plan.check_borrowed();
  const auto step = [&](const auto& run) {
    if (plan.borrowed()) return run();
    const py::gil_scoped_release release;
    run();
  };
  if (plan.reduces()) {
    const cpu::ReducingCall call = cpu_reducing_call(plan, given);
    step([&] { cpu::reducing_step(call, threads); });
  } else {
    std::vector<cpu::Work> work;
    const cpu::Call call = cpu_call(plan, given, &work);
    step([&] { cpu::step(call, threads); });
  }
  if (undisturbed)
    plan.increment_seen();
  else
    plan.increment_written(given.zero_grads || given.write_grads);
  plan.release_grads();
}

void cpu_step(Plan& plan, const py::tuple& hyper, bool maximize, double grad_scale, double coefficient, bool zero_grads,
              bool write_grads, double average_weight, int threads) {
  Given given{{}, maximize, grad_scale, coefficient, zero_grads, write_grads, average_weight};
  read_hyper(plan, hyper, given.hyper);
  update(plan, given, false, threads);
}

// Gathers the gradients of all plans and updates their parameters: what Plan::gather() and cpu_step() do for one plan
// after the other, without a way back to the interpreter between them. parts: (plan, hyper, maximize, average_weight)
// of each. Returns the number of calls of the engine; or -1, and nothing has changed, if a plan does not fit or has
// gradients that cannot be used as they are.
int cpu_gather_and_step(const py::list& parts, int threads) {
  std::vector<std::pair<Plan*, Given>> steps;
  for (const py::handle part : parts) {
    const auto [plan, hyper, maximize, average_weight] = part.cast<std::tuple<Plan*, py::tuple, bool, double>>();
    steps.emplace_back(plan, Given{{}, maximize, 1.0, 1.0, false, false, average_weight});
    read_hyper(*plan, hyper, steps.back().second.hyper);
  }
  const auto release_all = [&] {
    for (const auto& [plan, given] : steps) plan->release_grads();
  };
  bool undisturbed = true;
  int calls = 0;
  try {
    for (const auto& [plan, given] : steps) {
      if (plan->gather(true, py::none()) == Gathered::kStale || !plan->odd_grads().empty()) {
        release_all();
        return -1;
      }
      undisturbed = undisturbed && plan->undisturbed();
    }
    for (const auto& [plan, given] : steps) {
      if (!plan->any_active()) continue;
      update(*plan, given, undisturbed, threads);
      ++calls;
    }
  } catch (...) {
    release_all();
    throw;
  }
  return calls;
}

void cpu_run_range(const Plan& plan, const py::tuple& hyper, bool maximize, double grad_scale, int64_t first,
                   int64_t last) {
  Given given{{}, maximize, grad_scale, 1.0, false, false, 0.0};
  read_hyper(plan, hyper, given.hyper);
  std::vector<cpu::Work> work;
  const cpu::Call call = cpu_call(plan, given, &work);
  if (first < 0 || first > last || last > call.numel || !cpu::can_split_at(call, first) ||
      !cpu::can_split_at(call, last))
    throw std::invalid_argument("the range is not one of the plan");
  cpu::run_range(call, first, last);
}

// {rule: (hyperparameter names, state names)}: the tests compare them with the other languages'.
py::dict rules() {
  py::dict result;
  const auto add = [&](auto rule) {
    using Rule = decltype(rule);
    std::vector<std::string> hyper(std::begin(Rule::kHyper), std::end(Rule::kHyper));
    std::vector<std::string> states(std::begin(Rule::kStateNames), std::end(Rule::kStateNames));
    result[Rule::kName] = py::make_tuple(hyper, states);
  };
  for (int id = 0; id < static_cast<int>(RuleId::kCount); ++id) visit_rule(static_cast<RuleId>(id), add);
  for (int id = 0; id < static_cast<int>(ReducingRuleId::kCount); ++id)
    visit_reducing_rule(static_cast<ReducingRuleId>(id), add);
  return result;
}

py::list pointers(const Plan& plan) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  py::list rows;
  for (const Record& record : plan.records()) {
    py::list row;
    row.append(address(record.param));
    row.append(address(record.step));
    for (const void* state : record.states) row.append(address(state));
    rows.append(row);
  }
  return rows;
}

py::list storage(const Plan& plan) {
  py::list rows;
  for (const Record& record : plan.records()) {
    const Precision& precision = record.precision;
    py::list row;
    row.append(reinterpret_cast<uintptr_t>(precision.companion));
    for (const void* scales : precision.scales) row.append(reinterpret_cast<uintptr_t>(scales));
    row.append(precision.seed);
    row.append(precision.index);
    rows.append(row);
  }
  return rows;
}

py::list follower_pointers(const Plan& plan) {
  py::list rows;
  for (const Record& record : plan.records())
    rows.append(py::make_tuple(reinterpret_cast<uintptr_t>(record.average), reinterpret_cast<uintptr_t>(record.copy)));
  return rows;
}

// One int64 address per tensor, 0 for those that take no part; empty tensors that do have address 16.
py::bytes grad_pointers(const Plan& plan) {
  std::vector<int64_t> addresses(plan.size());
  for (size_t i = 0; i < plan.size(); ++i) {
    const int64_t address = reinterpret_cast<int64_t>(plan.grad(i));
    addresses[i] = !plan.active(i) ? 0 : address != 0 ? address : 16;
  }
  return py::bytes(reinterpret_cast<const char*>(addresses.data()), addresses.size() * sizeof(int64_t));
}

std::vector<int64_t> active(const Plan& plan) {
  std::vector<int64_t> indices;
  for (size_t i = 0; i < plan.size(); ++i) {
    if (plan.active(i)) indices.push_back(static_cast<int64_t>(i));
  }
  return indices;
}

std::vector<int> grad_dtypes(const Plan& plan) {
  std::vector<int> dtypes;
  for (const Record& record : plan.records()) dtypes.push_back(static_cast<int>(record.grad_dtype));
  return dtypes;
}

}  // namespace
}  // namespace fusedstep

PYBIND11_MODULE(_C, m) {
  using namespace fusedstep;
  m.doc() = "fusedstep's compiled engines";
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, const std::vector<std::string>&, const py::list&, const py::list&,
                    const py::list&, const py::list&, const py::list&, const py::list&>(),
           py::arg("rule"), py::arg("state_names"), py::arg("owners"), py::arg("tensors"), py::arg("steps"),
           py::arg("states"), py::arg("matrices") = py::list(), py::arg("precision") = py::list())
      .def(
          "gather",
          [](Plan& plan, bool borrow, const py::object& grads) { return static_cast<int>(plan.gather(borrow, grads)); },
          py::arg("borrow"), py::arg("grads") = py::none())
      .def("follow", &Plan::follow, py::arg("averages"), py::arg("copies"))
      .def("follower_pointers", &follower_pointers, "[average, copy] of each tensor, as addresses")
      .def("borrowed", &Plan::borrowed, "whether gather() found gradients that it does not hold")
      .def("odd_grads", &Plan::odd_grads)
      .def("drop_grad", &Plan::drop_grad)
      .def("set_grad", &Plan::set_grad)
      .def("release_grads", &Plan::release_grads)
      .def("increment_written", &Plan::increment_written, py::arg("grads_too"))
      .def("pointers", &pointers, "[param, step, states...] of each tensor, as addresses")
      .def("storage", &storage, "[companion, scales..., seed, index] of each tensor")
      .def("grad_pointers", &grad_pointers)
      .def("grad_dtypes", &grad_dtypes, "of each tensor in this step: 0 fp32, 1 bf16, 2 fp16, 3 fp64")
      .def("any_active", &Plan::any_active, "whether a tensor takes part in this step")
      .def("active", &active, "indices of the tensors that take part in this step");
  py::class_<Overlaps>(m, "Overlaps")
      .def(py::init<>())
      .def("find", &Overlaps::find, py::arg("plans"), py::arg("others"));
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::dict&, const py::list&>(), py::arg("state"), py::arg("param_groups"))
      .def("unchanged", &Watch::unchanged, py::arg("state"), py::arg("param_groups"));
  m.def("cpu_step", &cpu_step, py::arg("plan"), py::arg("hyper"), py::arg("maximize"), py::arg("grad_scale"),
        py::arg("coefficient"), py::arg("zero_grads"), py::arg("write_grads"), py::arg("average_weight"),
        py::arg("threads"));
  m.def("cpu_gather_and_step", &cpu_gather_and_step, py::arg("parts"), py::arg("threads"));
  bind_norm(m);
  m.def("cpu_run_range", &cpu_run_range, py::arg("plan"), py::arg("hyper"), py::arg("maximize"), py::arg("grad_scale"),
        py::arg("first"), py::arg("last"),
        "update some of the elements, counted through all tensors, without counting it as a step: for tests");
  m.def(
      "cpu_advance_schedules",
      [](uintptr_t values, uintptr_t table, int64_t n) {
        for (int64_t i = 0; i < n; ++i)
          advance_schedule(reinterpret_cast<double*>(values), reinterpret_cast<const double*>(table), n, i);
      },
      py::arg("values"), py::arg("table"), py::arg("n"), "count a step of n groups; the arguments are schedule.h's");
  m.def("cpu_isa", &cpu::isa);
  m.def("cpu_isas", &cpu::available_isas);
  m.def("set_cpu_isa", &cpu::set_isa);
  if (const char* isa = std::getenv("FUSEDSTEP_ISA"); isa != nullptr && *isa != '\0') {
    try {
      cpu::set_isa(isa);
    } catch (const std::exception& error) {
      throw std::invalid_argument(std::string("FUSEDSTEP_ISA: ") + error.what());
    }
  }
  m.def("rules", &rules);
  m.def("rule_id", [](const std::string& name, const std::vector<std::string>& state_names) {
    return static_cast<int>(find_rule(name, state_names));
  });
  m.def("look_up_torch", &look_up_torch, "to be called once, before anything else that takes a tensor");
  m.def("has_exchange_api", &has_exchange_api);
  bind_cuda(m);
  m.attr("with_cuda") = static_cast<bool>(FUSEDSTEP_WITH_CUDA);
}

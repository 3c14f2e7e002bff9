// The Python module fusedstep._C: plans, the engines behind them, and a watch over the optimizer's own dictionaries.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdlib>
#include <tuple>

#include "change_detector.h"
#include "cpu/engine.h"
#include "cpu/reducing.h"
#include "cuda_bindings.h"
#include "given_step.h"
#include "norm_bindings.h"
#include "overlaps.h"
#include "plan.h"
#include "schedule.h"
#include "words.h"

namespace fusedstep {
namespace {

// This may run code of the interpreter.
cpu::Step to_step(const Plan& plan, const GivenStep& given) {
  cpu::Step step{};
  if (plan.device() != Device::kCpu && plan.has_memory()) throw std::invalid_argument("the plan is not on the CPU");
  if (static_cast<int>(given.hyper.size()) != plan.n_hyper())
    throw std::invalid_argument("wrong number of hyperparameters");
  for (size_t k = 0; k < given.hyper.size(); ++k) step.hyper[k] = to_double(PyTuple_GET_ITEM(given.hyper.ptr(), k));
  step.maximize = given.maximize;
  step.grad_scale = given.grad_scale.is_none() ? 1.0 : to_double(given.grad_scale.ptr());
  step.coefficient = given.coefficient.is_none() ? 1.0 : to_double(given.coefficient.ptr());
  step.zero_grads = given.zero_grads;
  step.write_grads = given.write_grads;
  step.average_weight = given.average_weight;
  return step;
}

// A call for what a plan has gathered; `work` is the memory behind it.
cpu::Call to_call(const Plan& plan, const cpu::Step& step, std::vector<cpu::Work>* work) {
  cpu::Call call{step, plan.rule(), nullptr, 0, 0};
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

cpu::ReducingCall to_reducing_call(const Plan& plan, const cpu::Step& step) {
  cpu::ReducingCall call{step, plan.reducing_rule(), {}, 0};
  for (size_t i = 0; i < plan.size(); ++i) {
    if (!plan.active(i)) continue;
    call.work.push_back(cpu::ReducingWork{&plan.records()[i], plan.grad(i)});
    call.numel += plan.records()[i].numel;
  }
  return call;
}

// The stages of a step on what a plan of parts has gathered.
class CpuParts {
 public:
  // wholes: (rows, columns, elements) of the tensor of which each of the plan's records is a part.
  CpuParts(const Plan& plan, const py::object& step, const std::vector<std::array<int64_t, 3>>& wholes, int threads)
      : parts_(to_reducing_call(plan, to_step(plan, GivenStep(step))), active_wholes(plan, wholes), threads) {}

  void run(int stage, uintptr_t numbers, int64_t size) {
    if (stage < 0 || stage > 3 || size != parts_.size(stage))
      throw std::invalid_argument("the numbers are not those of the stage");
    const py::gil_scoped_release release;
    parts_.run(stage, reinterpret_cast<double*>(numbers));
  }

 private:
  static std::vector<cpu::WholeTensor> active_wholes(const Plan& plan,
                                                     const std::vector<std::array<int64_t, 3>>& wholes) {
    if (wholes.size() != plan.size()) throw std::invalid_argument("there must be as many wholes as records");
    std::vector<cpu::WholeTensor> active;
    for (size_t i = 0; i < plan.size(); ++i) {
      if (plan.active(i)) active.push_back(cpu::WholeTensor{wholes[i][0], wholes[i][1], wholes[i][2]});
    }
    return active;
  }

  cpu::ReducingParts parts_;
};

// Updates what a plan has gathered. undisturbed: all plans of this step are so, and since they have gathered, this has
// neither returned to the interpreter nor let its lock go.
void update(Plan& plan, const cpu::Step& step, bool undisturbed, int threads) {
  if (!undisturbed) plan.check_borrowed();
  const auto call_engine = [&](const auto& run) {
    if (plan.borrowed()) return run();
    const py::gil_scoped_release release;
    run();
  };
  if (plan.reduces()) {
    const cpu::ReducingCall call = to_reducing_call(plan, step);
    call_engine([&] { cpu::reducing_step(call, threads); });
  } else {
    std::vector<cpu::Work> work;
    const cpu::Call call = to_call(plan, step, &work);
    call_engine([&] { cpu::step(call, threads); });
  }
  if (undisturbed)
    plan.increment_seen();
  else
    plan.increment_written(step.zero_grads || step.write_grads);
  plan.release_grads();
}

void cpu_step(Plan& plan, const py::object& step, int threads) {
  update(plan, to_step(plan, GivenStep(step)), false, threads);
}

// Gathers the gradients of all plans and updates their parameters: what Plan::gather() and cpu_step() do for one plan
// after the other, without a way back to the interpreter between them. parts: (plan, step) of each. Returns the number
// of calls of the engine; or -1, and nothing has changed, if a plan does not fit or has gradients that cannot be used
// as they are.
int cpu_gather_and_step(const py::list& parts, int threads) {
  std::vector<std::pair<Plan*, cpu::Step>> steps;
  for (const py::handle part : parts) {
    const auto [plan, step] = part.cast<std::tuple<Plan*, py::object>>();
    steps.emplace_back(plan, to_step(*plan, GivenStep(step)));
  }
  const auto release_all = [&] {
    for (const auto& [plan, step] : steps) plan->release_grads();
  };
  bool undisturbed = true;
  int calls = 0;
  try {
    for (const auto& [plan, step] : steps) {
      if (plan->gather(true, py::none()) == Gathered::kStale || !plan->unconverted_grads().empty()) {
        release_all();
        return -1;
      }
      undisturbed = undisturbed && plan->undisturbed();
    }
    for (const auto& [plan, step] : steps) {
      if (!plan->any_active()) continue;
      update(*plan, step, undisturbed, threads);
      ++calls;
    }
  } catch (...) {
    release_all();
    throw;
  }
  return calls;
}

void cpu_run_range(const Plan& plan, const py::object& step, int64_t first, int64_t last) {
  std::vector<cpu::Work> work;
  const cpu::Call call = to_call(plan, to_step(plan, GivenStep(step)), &work);
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

py::dict found_words() {
  const Words found = find_words();
  py::dict result;
  const auto add = [&](const char* name, int64_t at) { result[name] = at; };
  add("object", found.object), add("storage", found.storage), add("kind", found.kind), add("grad", found.grad);
  add("python", found.python), add("version", found.version), add("counter", found.counter);
  return result;
}

// The records themselves, laid out as record_fields() says.
py::bytes records(const Plan& plan) {
  return py::bytes(reinterpret_cast<const char*>(plan.records().data()), plan.size() * sizeof(Record));
}

// {"names", "formats", "offsets", "itemsize"} of a Record, as numpy.dtype() takes them.
py::dict record_fields() {
  py::list names, formats, offsets;
  const auto add = [&](const char* name, const char* format, size_t offset) {
    names.append(name);
    formats.append(format);
    offsets.append(offset);
  };
  const std::string states = "(" + std::to_string(kMaxStates) + ",)";
  add("param", "i8", offsetof(Record, param));
  add("states", (states + "i8").c_str(), offsetof(Record, states));
  add("step", "i8", offsetof(Record, step));
  add("numel", "i8", offsetof(Record, numel));
  add("average", "i8", offsetof(Record, average));
  add("copy", "i8", offsetof(Record, copy));
  add("param_dtype", "u1", offsetof(Record, param_dtype));
  add("grad_dtype", "u1", offsetof(Record, grad_dtype));
  add("state_dtypes", (states + "u1").c_str(), offsetof(Record, state_dtypes));
  add("copy_dtype", "u1", offsetof(Record, copy_dtype));
  constexpr size_t precision = offsetof(Record, precision), matrices = offsetof(Record, matrices);
  add("aux", "i8", precision + offsetof(Precision, aux));
  add("scales", (states + "i8").c_str(), precision + offsetof(Precision, scales));
  add("seed", "u8", precision + offsetof(Precision, seed));
  add("index", "u4", precision + offsetof(Precision, index));
  constexpr size_t element_map = precision + offsetof(Precision, element_map);
  add("first_element", "i8", element_map + offsetof(ElementMap, first));
  add("run", "i8", element_map + offsetof(ElementMap, run));
  add("runs", "i8", element_map + offsetof(ElementMap, runs));
  add("run_stride", "i8", element_map + offsetof(ElementMap, stride));
  add("outer_stride", "i8", element_map + offsetof(ElementMap, outer));
  add("weight_format", "u1", precision + offsetof(Precision, weight_format));
  add("state_bits", "u1", precision + offsetof(Precision, state_bits));
  add("batch", "i8", matrices + offsetof(Matrices, batch));
  add("rows", "i8", matrices + offsetof(Matrices, rows));
  add("columns", "i8", matrices + offsetof(Matrices, columns));
  add("factored", "?", matrices + offsetof(Matrices, factored));
  py::dict fields;
  fields["names"] = names;
  fields["formats"] = formats;
  fields["offsets"] = offsets;
  fields["itemsize"] = sizeof(Record);
  return fields;
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

}  // namespace
}  // namespace fusedstep

PYBIND11_MODULE(_C, m) {
  using namespace fusedstep;
  m.doc() = "fusedstep's compiled engines";
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, const std::vector<std::string>&, const py::list&>(), py::arg("rule"),
           py::arg("state_names"), py::arg("records"))
      .def(
          "gather",
          [](Plan& plan, bool borrow, const py::object& grads) { return static_cast<int>(plan.gather(borrow, grads)); },
          py::arg("borrow"), py::arg("grads") = py::none())
      .def("borrowed", &Plan::borrowed, "whether gather() found gradients that it does not hold")
      .def("unconverted_grads", &Plan::unconverted_grads)
      .def("drop_grad", &Plan::drop_grad)
      .def("set_grad", &Plan::set_grad)
      .def("watch_part", &Plan::watch_part, "look at what owner i wraps, a DTensor, and its gradient, in every step")
      .def("release_grads", &Plan::release_grads)
      .def("increment_written", &Plan::increment_written, py::arg("grads_too"))
      .def("records", &records, "the bytes of all records, laid out as record_fields() says")
      .def("grad_pointers", &grad_pointers)
      .def("grad_dtypes_version", &Plan::grad_dtypes_version, "another number after each change of one's dtype")
      .def("any_active", &Plan::any_active, "whether a tensor takes part in this step")
      .def("active", &active, "indices of the tensors that take part in this step");
  py::class_<Overlaps>(m, "Overlaps")
      .def(py::init<>())
      .def("find", &Overlaps::find, py::arg("plans"), py::arg("others"));
  py::class_<ChangeDetector>(m, "ChangeDetector")
      .def(py::init<const py::dict&, const py::list&>(), py::arg("state"), py::arg("param_groups"))
      .def("unchanged", &ChangeDetector::unchanged, py::arg("state"), py::arg("param_groups"));
  m.def("record_fields", &record_fields, "how a record lies in memory, as numpy.dtype() takes it");
  m.def("cpu_step", &cpu_step, py::arg("plan"), py::arg("step"), py::arg("threads"));
  py::class_<CpuParts>(m, "CpuParts")
      .def(py::init<const Plan&, const py::object&, const std::vector<std::array<int64_t, 3>>&, int>(), py::arg("plan"),
           py::arg("step"), py::arg("wholes"), py::arg("threads"), py::keep_alive<1, 2>())
      .def("run", &CpuParts::run, py::arg("stage"), py::arg("numbers"), py::arg("size"),
           "run stage 0, 1, 2 or 3 of cpu/reducing.h; numbers is an address");
  m.def("cpu_gather_and_step", &cpu_gather_and_step, py::arg("parts"), py::arg("threads"));
  bind_norm(m);
  m.def("cpu_run_range", &cpu_run_range, py::arg("plan"), py::arg("step"), py::arg("first"), py::arg("last"),
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
  m.def("find_words", &found_words, "where torch keeps what a plan looks at in every step; -1: it is not known");
  m.def("has_exchange_api", &has_exchange_api);
  bind_cuda(m);
}

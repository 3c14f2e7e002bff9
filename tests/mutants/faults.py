"""The seeded faults: each replaces a text that occurs exactly once in a file, and names the tests that must notice.

A fault is what a tired hand writes: a forgotten decay, a tail that is not stored, two numbers exchanged, a feature that
one engine lacks. They go through all engines and all that the host does around a step. ``make mutants`` shows that each
is noticed, so that nothing is lost where tests are removed.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """``old`` becomes ``new`` in ``file``; ``tests`` are arguments of pytest, the quickest first."""

    what: str
    file: str
    old: str
    new: str
    tests: str


PARENTS = "tests/test_parents.py"
BITS = "tests/test_engines.py"
STORAGE = "tests/test_engines.py tests/test_cpu_engine.py"
QUANTIZERS = "tests/test_quantizers.py"
PRECISION = "tests/test_precision_options.py"
CHAIN = "tests/test_precision_chain.py"
REDUCING = "tests/test_reducing.py tests/test_adafactor.py"
PARTS = "tests/test_ranks_reducing.py"
STAGES = "tests/test_reducing_stages.py"
UNSEEN = "tests/test_ranks_device.py"
CUDA = "tests/test_cuda_host.py tests/test_engines.py"
CUDA_STORAGE = "tests/test_engines.py"
CUDA_REDUCING = "tests/test_reducing_engines.py"
TRITON = "tests/test_triton.py tests/test_engines.py"

# Rules in Python, for the reference and Triton; the parent classes judge them.
REFERENCE = [
    Fault(
        "Adam: no decoupled decay",
        "python/fusedstep/optimizers/adam.py",
        "        param = param * s.decay\n",
        "",
        PARENTS,
    ),
    Fault(
        "Adagrad: the rate decays a step too early",
        "python/fusedstep/optimizers/adagrad.py",
        "1.0 + real(step - 1) * h.lr_decay",
        "1.0 + real(step) * h.lr_decay",
        PARENTS,
    ),
    Fault(
        "SGD: the first gradient is dampened",
        "python/fusedstep/optimizers/sgd.py",
        "take = where(first, 1.0, 1.0 - h.dampening)",
        "take = 1.0 - h.dampening",
        PARENTS,
    ),
    Fault(
        "AdaBelief: the rectified step takes the maximum",
        "python/fusedstep/optimizers/adabelief.py",
        "variance = where(s.rectify, exp_avg_var, max_exp_avg_var)",
        "variance = max_exp_avg_var",
        PARENTS,
    ),
    Fault(
        "Adafactor: the relative step ignores warmup_init",
        "python/fusedstep/optimizers/adafactor.py",
        "min_step = where(h.warmup_init != 0, 1e-6 * t, 1e-2)",
        "min_step = 1e-2",
        "tests/test_adafactor.py",
    ),
    Fault(
        "SGD: the buffer is not there where nesterov looks ahead",
        "python/fusedstep/optimizers/sgd.py",
        "where(s.nesterov, grad + s.momentum * momentum_buffer, momentum_buffer)",
        "where(s.nesterov, grad, momentum_buffer)",
        PARENTS,
    ),
    Fault(
        "Adagrad: eps is under the root",
        "python/fusedstep/optimizers/adagrad.py",
        "square_root(sum) + s.eps), sum",
        "square_root(sum + s.eps)), sum",
        PARENTS,
    ),
    Fault(
        "Adafactor: the weight does not decay",
        "python/fusedstep/optimizers/adafactor.py",
        "        return param * f.decay - update, exp_avg",
        "        return param - update, exp_avg",
        "tests/test_adafactor.py",
    ),
    Fault(
        "AdamWeightDecay: excluded parameters decay",
        "python/fusedstep/optimizers/adam_weight_decay.py",
        'return not any(re.search(pattern, name) for pattern in group["exclude_from_weight_decay"] or ())',
        "return True",
        "tests/test_own_options.py tests/test_recipe.py",
    ),
    Fault(
        "4 bits: a code without a sign is read as one with a sign",
        "python/fusedstep/codecs.py",
        "return (numbers ^ 8) - 8 if signed else numbers",
        "return (numbers ^ 8) - 8",
        QUANTIZERS,
    ),
    Fault(
        "8 bits: codes are rounded down",
        "python/fusedstep/codecs.py",
        "quantizer.steps(signed) + 2.0**23",
        "quantizer.steps(signed) - 0.5 + 2.0**23",
        QUANTIZERS,
    ),
    Fault(
        "a rule that reduces: rows are not multiplied by their matrix's factor",
        "python/fusedstep/backends/reference_reducing.py",
        "(factor * rule.matrix(_mean(total, each, arithmetic), scalars), *others)",
        "(factor, *others)",
        "tests/test_adafactor.py",
    ),
    Fault(
        "the reference does not maximize",
        "python/fusedstep/backends/reference.py",
        "return -grad if self.step.maximize else grad",
        "return grad",
        PARENTS,
    ),
]

# Rules in C++, for the CPU and CUDA engines.
RULES = [
    Fault(
        "Adam: the step size lacks the correction of the first bias",
        "csrc/rules.h",
        "s.step_size = static_cast<T>(lr / bias_correction1);",
        "s.step_size = static_cast<T>(lr);",
        BITS,
    ),
    Fault(
        "Lion: beta1 and beta2 are exchanged",
        "csrc/rules.h",
        "exp_avg = s.beta2 * exp_avg + s.one_minus_beta2 * grad;\n  }\n};\n\n// AdaBelief",
        "exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad;\n  }\n};\n\n// AdaBelief",
        BITS,
    ),
    Fault(
        "AMSGrad: the maximum is not kept",
        "csrc/rules.h",
        "if constexpr (kAmsgrad) max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);",
        "if constexpr (kAmsgrad) max_exp_avg_sq = exp_avg_sq;",
        BITS,
    ),
    Fault(
        "RMSprop: a negative variance is not zero",
        "csrc/rules.h",
        "variance = maximum(square_avg - grad_avg * grad_avg, T{});",
        "variance = square_avg - grad_avg * grad_avg;",
        BITS,
    ),
    Fault(
        "Amos: the gradient is clipped above only",
        "csrc/amos.h",
        "maximum(minimum(grad, zero + s.clip_value), zero - s.clip_value) : grad",
        "minimum(grad, zero + s.clip_value) : grad",
        BITS,
    ),
    Fault(
        "a maximum that loses a NaN",
        "csrc/arithmetic.h",
        "return ((b > a) | (b != b)) ? b : a;",
        "return b > a ? b : a;",
        BITS,
    ),
    Fault(
        "Adafactor: the update is not limited",
        "csrc/reducing_rules.h",
        "f.step_size = static_cast<T>(excess < 1.0 ? lr : lr / excess);",
        "f.step_size = static_cast<T>(lr);",
        REDUCING,
    ),
]

# The CPU engine.
CPU = [
    Fault(
        "the last few weights are not stored",
        "csrc/cpu/engine.cpp",
        "    param.store_part(i, n, p);\n",
        "",
        BITS,
    ),
    Fault(
        "all tensors take the scalars of the first one's step",
        "csrc/cpu/engine.cpp",
        "if (*record.step == counter_) return *this;",
        "if (step > 0) return *this;",
        BITS,
    ),
    Fault(
        "written gradients are negated with maximize",
        "csrc/cpu/engine.cpp",
        "    if (change.write) grad.store_part(i, n, g * change.sign);",
        "    if (change.write) grad.store_part(i, n, g);",
        "tests/test_clip.py tests/test_reducing.py",
    ),
    Fault(
        "averages of fp64 weights stand still",
        "csrc/cpu/engine.cpp",
        "if (work.record->has_followers()) follow<double>(*work.record, at, to, call.average_weight);",
        "",
        "tests/test_averages.py",
    ),
    Fault(
        "gradients that are not fp32 are not written",
        "csrc/cpu/tiles.cpp",
        "if (writes_grad && record.grad_dtype != Dtype::kF32)",
        "if (false)",
        f"{CHAIN} tests/test_all_or_nothing.py",
    ),
    Fault(
        "stochastic rounding draws the same numbers in each tile",
        "csrc/cpu/tiles.cpp",
        "static_cast<uint32_t>(step), at / kBlock * kBlock);",
        "static_cast<uint32_t>(step), 0);",
        STORAGE,
    ),
    Fault(
        "Kahan: an infinite weight leaves a rest",
        "csrc/cpu/tiles.cpp",
        "exponent != 0x7f800000u ? wide - back : FloatPack{}",
        "wide - back",
        STORAGE,
    ),
    Fault(
        "bf16 is rounded half up",
        "csrc/numeric.h",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
        "(bits + 0x8000u) >> 16",
        "tests/test_precision.py tests/test_averages.py tests/test_cuda_host.py",
    ),
    Fault(
        "8 bits: the last block takes the scale of the first",
        "csrc/cpu/quantized.h",
        "      copy.precision.scales[k] += block_;\n",
        "",
        STORAGE,
    ),
    Fault(
        "8 bits: gradients beside less than a block are not zeroed",
        "csrc/cpu/quantized.h",
        "    part.change_grads(wide_grads, 0);\n",
        "",
        CHAIN,
    ),
    Fault(
        "8 bits: a split zero with a negative rest becomes NaN",
        "csrc/cpu/quantized.h",
        "if (__builtin_expect(weight.doubts_load(at, kBlock), 0))",
        "if (false)",
        STORAGE,
    ),
    Fault(
        "a block of weights: a NaN is rounded like a number",
        "csrc/cpu/weights.h",
        "  if (__builtin_expect(doubt.any(), 0)) narrow_block_exactly(weight, at, n, wide);\n",
        "",
        STORAGE,
    ),
    Fault(
        "averages follow the upper half of a split weight",
        "csrc/cpu/followers.h",
        "wide[k] = join(upper[i + k], lower[i + k]);",
        "wide[k] = widen(upper[i + k]);",
        CHAIN,
    ),
    Fault(
        "small matrices: means of columns are divided by their number",
        "csrc/cpu/reducing.cpp",
        "divide(means, n * columns, rows);",
        "divide(means, n * columns, columns);",
        REDUCING,
    ),
    Fault(
        "large matrices: sums of columns go on from another row block",
        "csrc/cpu/reducing.cpp",
        "if (kColumns<Rule> && row % kRowBlock == 0) {",
        "if (kColumns<Rule> && row == 0) {",
        REDUCING,
    ),
    Fault(
        "narrow matrices: rows are followed by the next one's numbers",
        "csrc/cpu/narrow.h",
        "return Shape::kRows > 1 ? x : (FloatPack)((WordPack)x & mask_[w]);",
        "return x;",
        REDUCING,
    ),
    Fault(
        "narrow matrices: the rows behind the last whole pack of them count twice",
        "csrc/cpu/narrow.h",
        "i < kNumbers && i < n + kLanes<float> * columns; ++i) buffer_[i] = 0.0f;",
        "i < kNumbers && i < n + kLanes<float> * columns; ++i) buffer_[i] = buffer_[i - columns];",
        REDUCING,
    ),
    Fault(
        "sums in order: numbers of any sizes are added in any order",
        "csrc/cpu/lanes.h",
        "* 0x1p28)",
        "* 0x1p60)",
        "tests/test_other_cpu.py",
    ),
    Fault(
        "the norm forgets all but the last thousand numbers",
        "csrc/cpu/norm.cpp",
        "    sum += lanes.total();\n  }\n  Word most",
        "    sum = lanes.total();\n  }\n  Word most",
        "tests/test_clip.py",
    ),
    Fault(
        "threads share blocks of 8-bit states",
        "csrc/cpu/dispatch.cpp",
        "return by_blocks(work.record->precision) ? work.begin + (i - work.begin) / kBlock * kBlock : i;",
        "return i;",
        STORAGE,
    ),
    Fault(
        "a thread leaves what others have not begun",
        "csrc/cpu/dispatch.cpp",
        "for (int i = index; i < team; i += size) take_from(i);",
        "take_from(index);",
        "tests/test_process.py",
    ),
    Fault(
        "stochastic rounding draws the same numbers in each whole block",
        "csrc/cpu/weights.h",
        "random.fill(precision, step, i);",
        "random.fill(precision, step, 0);",
        STORAGE,
    ),
    Fault(
        "two packs of bf16 numbers: a NaN is rounded like a number",
        "csrc/cpu/wide.h",
        "    if (!kExact) doubt.nan_in(x);\n    return to_halves",
        "    return to_halves",
        BITS,
    ),
    Fault(
        "two packs of split weights: a zero with a negative rest becomes NaN",
        "csrc/cpu/weights.h",
        "    doubt.nan_in(x);\n    const WordPack a",
        "    const WordPack a",
        BITS,
    ),
    Fault(
        "two packs of Kahan's weights: an infinite one leaves a rest",
        "csrc/cpu/weights.h",
        "    else\n      doubt.nan_in({rest.a - rest.a, rest.b - rest.b});\n",
        "",
        BITS,
    ),
    Fault(
        "8 bits: states behind the third are forgotten",
        "csrc/cpu/quantized.h",
        "std::make_integer_sequence<int, kNumNamed<Rule>>{}",
        "std::make_integer_sequence<int, (kNumNamed<Rule> < 3 ? kNumNamed<Rule> : 3)>{}",
        "tests/test_own_rules.py",
    ),
    Fault(
        "8 bits: the scale of a block with an infinity is infinite",
        "csrc/cpu/quantized.h",
        "record_.precision.scales[k][block_] = Block::scale(max_abs);",
        "record_.precision.scales[k][block_] = bit_cast<float>(max_abs);",
        BITS,
    ),
    Fault(
        "8 bits: a block with a NaN keeps its codes",
        "csrc/cpu/quantized.h",
        "    if (Block(max_abs).keep == 0) std::fill(numbers, numbers + kBlock, 0.0f);\n",
        "",
        BITS,
    ),
    Fault(
        "4 bits: the second code of a byte overwrites the first",
        "csrc/cpu/quantizer.h",
        "(halves & 0xfu) | (halves >> 12 & 0xf0u)",
        "halves >> 12 & 0xf0u",
        STORAGE,
    ),
    Fault(
        "8 bits: numbers without a sign take the code of the next larger one",
        "csrc/cpu/quantizer.h",
        "subtract_to_zero(codes, WordPack{} + 0x00010001u)",
        "codes",
        STORAGE,
    ),
]

# The CUDA source, run on the host.
CUDA_ENGINE = [
    Fault(
        "parameters without a gradient age",
        "csrc/cuda/kernel.cuh",
        "if (a.grads[i] != nullptr) *global(a.records[i].step)",
        "*global(a.records[i].step)",
        CUDA,
    ),
    Fault(
        "a skipped step leaves gradients that it should zero",
        "csrc/cuda/kernel.cuh",
        "if (a.step.zero_grads) {",
        "if (false) {",
        f"{CHAIN} {CUDA}",
    ),
    Fault(
        "a thread's next numbers are those of its neighbour",
        "csrc/cuda/kernel.cuh",
        "const int stride = team.size * Way::kN;",
        "const int stride = team.size * Way::kN - Way::kN;",
        CUDA,
    ),
    Fault(
        "8 bits: the scale of a block with an infinity is infinite, in tiles",
        "csrc/cuda/states.cuh",
        "global(record.precision.scales[k])[block_of(at)] = Block::scale(max_abs);",
        "global(record.precision.scales[k])[block_of(at)] = bit_cast<float>(max_abs);",
        CUDA_STORAGE,
    ),
    Fault(
        "8 bits: a block with a NaN keeps its codes, in tiles",
        "csrc/cuda/states.cuh",
        "codes.words[i / kPerWord] = block.keep != 0 ? word_of(c) : 0u;",
        "codes.words[i / kPerWord] = word_of(c);",
        CUDA_STORAGE,
    ),
    Fault(
        "8 bits: the scale of a block with an infinity is infinite, in the general way",
        "csrc/cuda/general.cuh",
        "global(record.precision.scales[k])[at / kBlock] = Block::scale(max_abs[k]);",
        "global(record.precision.scales[k])[at / kBlock] = bit_cast<float>(max_abs[k]);",
        CUDA_STORAGE,
    ),
    Fault(
        "master weights: the fp32 copy is not stored in the general way",
        "csrc/cuda/general.cuh",
        "      global(static_cast<float*>(p.aux))[i] = param;\n",
        "",
        CUDA_STORAGE,
    ),
    Fault(
        "the general way has no averages",
        "csrc/cuda/general.cuh",
        "if (record.has_followers()) follow_one<T>(record, i, average_weight);",
        "",
        CUDA,
    ),
    Fault(
        "written gradients are negated with maximize, in tiles",
        "csrc/cuda/tile.cuh",
        "written[j] = change(grad[j]) * change.sign;",
        "written[j] = change(grad[j]);",
        CUDA,
    ),
    Fault(
        "unaligned tensors are read by whole vectors",
        "csrc/cuda/tile.cuh",
        "whole_from = (bits & 15) == 0 ? kN : INT_MAX;",
        "whole_from = kN;",
        CUDA,
    ),
    Fault(
        "split weights: nothing is borrowed from a zero",
        "csrc/cuda/weights.cuh",
        "    if (zeros == 0) return;\n",
        "    return;\n",
        f"{CUDA_STORAGE}",
    ),
    Fault(
        "the norm of a plan replaces those before it",
        "csrc/cuda/norm.cuh",
        "  if (!a.first) add(&sums, {norm.sum_of_squares, norm.max_abs});\n",
        "",
        CUDA,
    ),
    Fault(
        "the chunks of a tensor overlap",
        "csrc/cuda_table.cpp",
        "offset < elements; offset += size)",
        "offset < elements; offset += size - kBlock)",
        CUDA,
    ),
    Fault(
        "Adafactor: rows of flat tensors count twice in the second sum",
        "csrc/cuda/reducing_update.cuh",
        "  if (flat) {  // its states are for the last pass to write\n",
        "  if (false && flat) {\n",
        CUDA_REDUCING,
    ),
    Fault(
        "means of columns are divided by their number",
        "csrc/cuda/reducing_sums.cuh",
        "item.column + column, sum, p.rows, s);",
        "item.column + column, sum, p.columns, s);",
        CUDA_REDUCING,
    ),
]

# Triton's kernels, interpreted.
TRITON_ENGINE = [
    Fault(
        "scalars stay in float64",
        "triton_kernels/binding.py",
        "taken + (scalars[k].to(ARITHMETIC),)",
        "taken + (scalars[k],)",
        TRITON,
    ),
    Fault(
        "maximize is forgotten",
        "triton_kernels/step.py",
        "    if MAXIMIZE:\n        g = -g\n",
        "",
        TRITON,
    ),
    Fault(
        "the third state is not stored",
        "triton_kernels/stored.py",
        "        if STATES[k] != NONE:\n            store_state(",
        "        if k < 2 and STATES[k] != NONE:\n            store_state(",
        TRITON,
    ),
    Fault(
        "the norm of a launch replaces those before it",
        "triton_kernels/norm.py",
        "        if not FIRST:\n",
        "        if False:\n",
        TRITON,
    ),
    Fault(
        "stochastic rounding to fp16 takes too many bits",
        "triton_kernels/codecs.py",
        "(magnitude + (random & 0x1FFF) - 0x38000000) >> 13",
        "(magnitude + (random & 0x3FFF) - 0x38000000) >> 13",
        TRITON,
    ),
    Fault(
        "Kahan: the rest is not read",
        "triton_kernels/stored.py",
        "return load(row.param, begin, lanes, mask, PARAM, ARITHMETIC, UNMASKED) + rest",
        "return load(row.param, begin, lanes, mask, PARAM, ARITHMETIC, UNMASKED)",
        TRITON,
    ),
    Fault(
        "large matrices: only the first rows of a tile are finished",
        "triton_kernels/reducing_lines.py",
        "total += finish_lines(row_ptr, begin, n - first, mean",
        "total += finish_lines(row_ptr, begin, n - first - 1, mean",
        "tests/test_reducing_engines.py",
    ),
]

# What the host does around a step.
HOST = [
    Fault(
        "a skipped step is counted by a schedule",
        "python/fusedstep/stepping.py",
        "self.learning_rates.end_step(found_inf)",
        "self.learning_rates.end_step(None)",
        "tests/test_schedules_device.py",
    ),
    Fault(
        "a clipped step ignores the scale of its gradients",
        "python/fusedstep/gradients.py",
        "return backend.norm(members, self.last, limits, grad_scale, found_inf)",
        "return backend.norm(members, self.last, limits, None, found_inf)",
        "tests/test_clip.py tests/test_scaler.py",
    ),
    Fault(
        "a step that is skipped leaves gradients that it should zero",
        "python/fusedstep/gradients.py",
        "                layout.zero(grad)\n",
        "                pass\n",
        "tests/test_clip.py tests/test_all_or_nothing.py",
    ),
    Fault(
        "GradScaler forgets the user's own scale",
        "python/fusedstep/amp.py",
        'optimizer.grad_scale = scale * getattr(optimizer, "grad_scale", 1)',
        "optimizer.grad_scale = scale",
        "tests/test_scaler.py",
    ),
    Fault(
        "loaded states are not copies",
        "python/fusedstep/kept/kind.py",
        "    value = value.detach()\n    return layout.dense_like(param, value.dtype)",
        "    if value.stride() == param.stride():\n        return value\n"
        "    return layout.dense_like(param, value.dtype)",
        "tests/test_state_dict.py",
    ),
    Fault(
        "buffers of a parameter that has done no step are saved",
        "python/fusedstep/checkpoint.py",
        "counter is not None and counter.item() == 0:",
        "counter is None:",
        "tests/test_amp.py tests/test_state_dict.py",
    ),
    Fault(
        "a state that was cleared is counted on",
        "python/fusedstep/kept/step.py",
        "                count = 0.0\n        counter",
        "                pass\n        counter",
        "tests/test_step.py tests/test_counts.py",
    ),
    Fault(
        "averages of loaded checkpoints are dropped",
        "python/fusedstep/kept/ema.py",
        "return {KEY: layout.dense_like(param, average_dtype(param)).copy_(value)}",
        "return {}",
        "tests/test_averages.py",
    ),
    Fault(
        "the weight of an average is its decay",
        "python/fusedstep/kept/ema.py",
        "0.0 if self.decay is None else 1.0 - self.decay",
        "0.0 if self.decay is None else self.decay",
        "tests/test_averages.py",
    ),
    Fault(
        "states that must be exact are narrowed",
        "python/fusedstep/kept/states.py",
        "        if exact:\n            return torch.float32\n",
        "",
        PRECISION,
    ),
    Fault(
        "training goes on with another seed",
        "python/fusedstep/kept/__init__.py",
        "            found = part.get(SEED, found)\n",
        "",
        f"{PRECISION} tests/test_distributed_checkpoint.py",
    ),
    Fault(
        "the mean of micro-batches is their sum",
        "python/fusedstep/accumulate.py",
        "        if self.mean:\n            self._sums.scale(1.0 / self._weight)\n",
        "",
        "tests/test_accumulate.py",
    ),
    Fault(
        "a second round of accumulation adds to the first",
        "python/fusedstep/gradient_sums.py",
        "        self.seen.clear()\n        for _, counters in self.plans or ():\n            counters.zero_()\n",
        "        self.seen.clear()\n",
        "tests/test_accumulate.py",
    ),
    Fault(
        "a schedule ends its warm-up a step late",
        "python/fusedstep/schedules/schedule.py",
        "if num_update < self.warmup_steps:",
        "if num_update <= self.warmup_steps:",
        "tests/test_schedules.py",
    ),
    Fault(
        "clip_grad_norm_ scales what is within the limit",
        "python/fusedstep/clipping.py",
        "if not coefficient >= 1.0:  # NaN too",
        "if True:",
        "tests/test_clip.py",
    ),
    Fault(
        "autograd does not notice a step",
        "csrc/plan.cpp",
        "  increment_versions(all ? all_written_ : written);\n",
        "",
        "tests/test_step.py",
    ),
    Fault(
        "a state that moved is not noticed",
        "csrc/plan.cpp",
        "if (!memory.unchanged(at)) return Gathered::kStale;",
        "(void)memory;",
        "tests/test_step.py",
    ),
    Fault(
        "a parameter listed twice keeps the state of its second place",
        "python/fusedstep/planning.py",
        "backend.bucket(param), over, seen[param], is_last)",
        "backend.bucket(param), over, True, True)",
        "tests/test_step.py tests/test_clip.py",
    ),
]

SHARDED = [
    Fault(
        "stochastic rounding: every part begins with the first element of the whole tensor",
        "python/fusedstep/shards.py",
        "        first += int(indices[0]) * strides[dim]\n",
        "",
        "tests/test_shards.py",
    ),
    Fault(
        "norms: what is replicated counts for each process",
        "python/fusedstep/exchange.py",
        "return _groups(tensor, copies=False)",
        "return _groups(tensor, copies=True)",
        "tests/test_ranks.py",
    ),
    Fault(
        "norms: a step that is skipped in one process is made in the others",
        "python/fusedstep/gradients.py",
        "numbers[STOP] = torch.where(",
        "torch.where(",
        "tests/test_ranks.py",
    ),
    Fault(
        "an infinity in one process is not known to the others",
        "python/fusedstep/exchange.py",
        "numbers[ODD] += odd.to(self.device)",
        "pass",
        "tests/test_ranks.py",
    ),
    Fault(
        "8-bit states of a DTensor leave the optimizer as codes",
        "python/fusedstep/checkpoint.py",
        'shown_as_numbers(optimizer, param, state_dict["state"][key])',
        'state_dict["state"][key]',
        "tests/test_ranks.py",
    ),
    Fault(
        "a gradient may be placed otherwise than its parameter",
        "csrc/plan.cpp",
        "if (!placements.equal(part.placements) || !shape.equal(part.shape)) return false;",
        "if (!shape.equal(part.shape)) return false;",
        "tests/test_ranks.py",
    ),
    Fault(
        "the memory inside a DTensor may be exchanged",
        "csrc/plan.cpp",
        "if (!param_unchanged(at, i) || !wraps_param(i)) return",
        "if (!param_unchanged(at, i)) return",
        "tests/test_distributed.py",
    ),
    Fault(
        "averages: a forward pass takes weights that FSDP has gathered before",
        "python/fusedstep/kept/ema.py",
        "            gathered.drop(params)\n            optimizer.renew_copies()\n",
        "            optimizer.renew_copies()\n",
        "tests/test_ranks.py",
    ),
    Fault(
        "averages: training goes on with averages that FSDP has gathered",
        "python/fusedstep/kept/ema.py",
        "            gathered.drop(params)\n        ema.swapped = False\n",
        "        ema.swapped = False\n",
        "tests/test_ranks.py",
    ),
    Fault(
        "averages: weights that fully_shard has gathered stay",
        "python/fusedstep/gathered.py",
        "            module.reshard()\n",
        "            pass\n",
        "tests/test_ranks.py",
    ),
    Fault(
        "FSDP's pieces: states leave the optimizer in several dtypes",
        "python/fusedstep/kept/states.py",
        "return _in_one_dtype(param, shown) if is_flattened else shown",
        "return shown",
        "tests/test_ranks.py",
    ),
    Fault(
        "ZeRO: a schedule ends where a state is loaded",
        "python/fusedstep/optimizer.py",
        "            sharding.check_learning_rate(self, group)\n",
        "",
        "tests/test_sharding.py",
    ),
    Fault(
        "norms: processes clip by different limits",
        "python/fusedstep/gradients.py",
        "        if not differ:\n",
        "        if True:\n",
        "tests/test_ranks.py",
    ),
    Fault(
        "a process asks for a norm that no other one takes",
        "python/fusedstep/gradients.py",
        "if self.sharers is None or self.takes_norm == (limits is not None):",
        "if self.sharers is None or limits is not None:",
        "tests/test_ranks.py",
    ),
    Fault(
        "a call that is refused in one process leaves the others waiting",
        "python/fusedstep/optimizer.py",
        "            self.stepper.refuse(self, error)\n",
        "",
        "tests/test_ranks.py",
    ),
    Fault(
        "only the process with an error in its first step raises",
        "python/fusedstep/stepping.py",
        "            if not skipped:\n                planning.check_and_select(optimizer, limits is not None)\n",
        "            return\n",
        "tests/test_ranks.py",
    ),
    Fault(
        "norms: each limit that a step was given is kept",
        "python/fusedstep/gradients.py",
        "            if len(self.marks) > 8:  # limits of each step's own\n",
        "            if False:\n",
        "tests/test_ranks.py",
    ),
    Fault(
        "verify --distributed: a part that is not a number is within the tolerance",
        "python/fusedstep/sharded_comparison.py",
        "difference if math.isfinite(difference) else math.inf",
        "difference",
        "tests/test_sharded_verification.py",
    ),
    Fault(
        "sums of parts: means are over the part",
        "python/fusedstep/lines.py",
        "count = math.prod(param.shape[dim] for dim in dims)",
        "count = math.prod(shards.part_shape(param)[dim] for dim in dims)",
        PARTS,
    ),
    Fault(
        "sums of parts: what processes have in common is added up too",
        "python/fusedstep/lines.py",
        "exchange.over_dims(param, dims))",
        "exchange.over(param))",
        PARTS,
    ),
    Fault(
        "sums of parts: the mean of the rows' states stays that of the part",
        "python/fusedstep/shared_sums.py",
        "for number in range(1, PASSES):",
        "for number in range(2, PASSES):",
        PARTS,
    ),
    Fault(
        "sums of parts: a parameter without a gradient here has no norm",
        "python/fusedstep/shared_sums.py",
        "elif number == 0 and each is member.lines.tensor and not is_frozen:",
        "elif False:",
        PARTS,
    ),
    Fault(
        "sums of parts: where there is no gradient, a gradient elsewhere is not heard of",
        "python/fusedstep/shared_sums.py",
        "if flag % FROZEN and member.index not in self.asked:",
        "if False:",
        PARTS,
    ),
    Fault(
        "sums of parts: a step that is skipped in one process is made in the others",
        "python/fusedstep/shared_sums.py",
        "        if stop:\n",
        "        if False:\n",
        PARTS,
    ),
    Fault(
        "sums of parts: states of columns are sharded as the rows are",
        "python/fusedstep/rule.py",
        'summed = dims[columns:] if span == "row" else dims[rows:columns]',
        "summed = dims[columns:]",
        PARTS,
    ),
    Fault(
        "a state that has fewer dimensions than the parameter is sharded along the parameter's",
        "python/fusedstep/shards.py",
        "_moved(placement, places[placement.dim]) if",
        "placement if",
        PARTS,
    ),
    Fault(
        "sums of parts, CPU: rows are divided by their number",
        "csrc/cpu/reducing.cpp",
        "lines.columns ? tensor.whole->rows : tensor.whole->columns",
        "lines.columns ? tensor.whole->columns : tensor.whole->rows",
        PARTS,
    ),
    Fault(
        "sums of parts, CPU: the mean of a matrix's rows is that of the part",
        "csrc/cpu/reducing_parts.h",
        "if (const double* const totals = block.tensor.whole_matrices; totals != nullptr) {",
        "if (const double* const totals = block.tensor.whole_matrices; false) {",
        PARTS,
    ),
    Fault(
        "sums of parts, CPU: the scale is that of the part",
        "csrc/cpu/reducing_parts.h",
        "if (of_whole != nullptr) return",
        "if (false) return",
        PARTS,
    ),
    Fault(
        "sums of parts, CPU: of lines in several blocks the last block counts",
        "csrc/cpu/reducing_dispatch.cpp",
        "totals[i] += static_cast<double>(block[i]);",
        "totals[i] = static_cast<double>(block[i]);",
        PARTS,
    ),
    Fault(
        "sums of parts, CUDA: the mean of a row is over the part",
        "csrc/cuda/reducing_stages.cuh",
        "context.rows()[line], context.part.columns, s);",
        "context.rows()[line], context.p.columns, s);",
        STAGES,
    ),
    Fault(
        "sums of parts, CUDA: only the first block of rows has states to sum",
        "csrc/cuda/reducing_stages.cuh",
        "if (item.column != 0) return;",
        "if (item.column != 0 || item.row != 0) return;",
        STAGES,
    ),
    Fault(
        "sums of parts, CUDA: the scale is that of the part",
        "csrc/cuda/reducing_stages.cuh",
        "root_mean(*context.param(), context.part.numel);",
        "root_mean(*context.param(), context.record.numel);",
        STAGES,
    ),
    Fault(
        "sums of parts on a GPU: who fails does not enter the later exchanges",
        "python/fusedstep/stepping.py",
        "packs = self.sums.packs[:1] if self.gradients.sharers.host_sees else self.sums.packs",
        "packs = self.sums.packs[:1]",
        UNSEEN,
    ),
    Fault(
        "sums of parts on a GPU: a gradient of what is frozen elsewhere is made a step with",
        "python/fusedstep/shared_sums.py",
        "& (flags >= FROZEN)).any(), FAIL, 0.0)",
        "& (flags >= FROZEN)).any(), 0.0, 0.0)",
        UNSEEN,
    ),
]

GROUPS = {
    "Rules in Python": REFERENCE,
    "Rules in C++": RULES,
    "CPU engine": CPU,
    "CUDA source, run on the host": CUDA_ENGINE,
    "Triton's kernels, interpreted": TRITON_ENGINE,
    "Around the step": HOST,
    "Parts of tensors": SHARDED,
}

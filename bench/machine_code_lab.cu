// The barest kernels that do what the package's do, one for each storage: no table, no tails, no options, one tile a
// block, every array asked for before the first number is used. machine_code.py compiles them by the same nvcc and
// takes their instructions and registers as budgets. They are never run.
//
// The arithmetic is the package's, for that is fixed. How numbers get into registers and back is the lab's own.
#include "../csrc/codecs.h"
#include "../csrc/reducing_rules.h"
#include "../csrc/rules.h"

namespace lab {

using fusedstep::bit_cast;
using fusedstep::Block;

constexpr int kThreads = 256;
struct BF16 {
  uint16_t bits;
};
struct Split {};  // bf16 and the 16 bits below it, in an array each

__device__ __forceinline__ uint32_t bits_of(float x) {
  return __float_as_uint(x);
}

// kN neighbours of an array: words as they lie in memory.
template <class S, int kN>
struct Words {
  static constexpr int kWords = kN * static_cast<int>(sizeof(S)) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const S* from) {
    if constexpr (kWords == 2) {
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
    } else {
#pragma unroll
      for (int w = 0; w < kWords; w += 4)
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[w]), "=r"(words[w + 1]), "=r"(words[w + 2]), "=r"(words[w + 3])
                     : "l"(reinterpret_cast<const uint32_t*>(from) + w));
    }
  }
  __device__ __forceinline__ void store(S* to) const {
    if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int w = 0; w < kWords; w += 4)
        reinterpret_cast<uint4*>(to)[w / 4] = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
    }
  }
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(S) == 4) return __uint_as_float(words[i]);
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
  __device__ __forceinline__ void put(const float* numbers) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(S) == 4)
        words[w] = bits_of(numbers[w]);
      else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[w]) : "f"(numbers[2 * w + 1]), "f"(numbers[2 * w]));
    }
  }
};

// Weights in one array, or split between two.
template <class P, int kN>
struct Weights {
  Words<P, kN> whole;

  __device__ __forceinline__ void load(const void* param, const void*, int64_t at) {
    whole.load(static_cast<const P*>(param) + at);
  }
  __device__ __forceinline__ float get(int i) const { return whole.get(i); }
  __device__ __forceinline__ void store(void* param, void*, int64_t at, const float* numbers) {
    whole.put(numbers);
    whole.store(static_cast<P*>(param) + at);
  }
};
template <int kN>
struct Weights<Split, kN> {
  Words<uint16_t, kN> upper, lower;

  __device__ __forceinline__ void load(const void* param, const void* rest, int64_t at) {
    upper.load(static_cast<const uint16_t*>(param) + at);
    lower.load(static_cast<const uint16_t*>(rest) + at);
  }
  __device__ __forceinline__ float get(int i) const {
    const uint32_t both = __byte_perm(lower.words[i / 2], upper.words[i / 2], i % 2 ? 0x7632 : 0x5410);
    return __uint_as_float(both - ((both & 0x8000u) << 1));
  }
  __device__ __forceinline__ void store(void* param, void* rest, int64_t at, const float* numbers) {
#pragma unroll
    for (int w = 0; w < kN / 2; ++w) {
      const uint32_t first = bits_of(numbers[2 * w]) + 0x8000u, second = bits_of(numbers[2 * w + 1]) + 0x8000u;
      upper.words[w] = __byte_perm(first, second, 0x7632);
      lower.words[w] = __byte_perm(first, second, 0x5410) ^ 0x80008000u;
    }
    upper.store(static_cast<uint16_t*>(param) + at);
    lower.store(static_cast<uint16_t*>(rest) + at);
  }
};

using Rule = fusedstep::Adam<false>;
using Scalars = Rule::Scalars<float>;
struct Arrays {
  void *param, *rest;
  const void* grad;
  void *first, *second;
  float *first_scales, *second_scales, *average;
};

__device__ __forceinline__ int64_t place(int n) {
  return (int64_t{blockIdx.x} * kThreads + threadIdx.x) * n;
}

template <class P, class G, class M>
__global__ void __launch_bounds__(kThreads, 4) adamw(Arrays a, int64_t n, Scalars s) {
  constexpr int kN = sizeof(P) == 4 && sizeof(G) == 4 && sizeof(M) == 4 ? 4 : 8;
  const int64_t at = place(kN);
  if (at >= n) return;
  Weights<P, kN> param;
  Words<G, kN> grad;
  Words<M, kN> first, second;
  param.load(a.param, a.rest, at);
  grad.load(static_cast<const G*>(a.grad) + at);
  first.load(static_cast<M*>(a.first) + at);
  second.load(static_cast<M*>(a.second) + at);
  float p[kN], m[kN], v[kN], none = 0.0f;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    p[i] = param.get(i), m[i] = first.get(i), v[i] = second.get(i);
    Rule::update(p[i], grad.get(i), m[i], v[i], none, s);
  }
  first.put(m);
  second.put(v);
  param.store(a.param, a.rest, at, p);
  first.store(static_cast<M*>(a.first) + at);
  second.store(static_cast<M*>(a.second) + at);
}

// A warp has a block of 256 numbers. A code becomes a float by a byte permutation into 2^23 + code.
template <class P, class G>
__global__ void __launch_bounds__(kThreads, 4) adamw_8bit(Arrays a, int64_t n, Scalars s) {
  constexpr int kN = 8;
  const int64_t at = place(kN), block = at / 256;
  if (at >= n) return;
  Weights<P, kN> param;
  Words<G, kN> grad;
  Words<uint8_t, kN> first, second;
  const float first_scale = a.first_scales[block], second_scale = a.second_scales[block];
  first.load(static_cast<uint8_t*>(a.first) + at);
  second.load(static_cast<uint8_t*>(a.second) + at);
  param.load(a.param, a.rest, at);
  grad.load(static_cast<const G*>(a.grad) + at);
  float p[kN], m[kN], v[kN], none = 0.0f;
  uint32_t first_largest = 0, second_largest = 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const uint32_t pick = 0x7650u | i % 4;
    const float signed_code = __uint_as_float(__byte_perm(first.words[i / 4] ^ 0x80808080u, 0x4b000000u, pick));
    const float code = __uint_as_float(__byte_perm(second.words[i / 4], 0x4b000000u, pick));
    p[i] = param.get(i);
    m[i] = fusedstep::Quantizer<8, true>::dequantize<uint32_t>(signed_code - 8388736.0f, first_scale);
    v[i] = fusedstep::Quantizer<8, false>::dequantize<uint32_t>(code - 8388607.0f, second_scale);
    Rule::update(p[i], grad.get(i), m[i], v[i], none, s);
    first_largest = max(first_largest, bits_of(m[i]) & 0x7fffffffu);
    second_largest = max(second_largest, bits_of(v[i]) & 0x7fffffffu);
  }
  first_largest = __reduce_max_sync(~0u, first_largest);
  second_largest = __reduce_max_sync(~0u, second_largest);
  const Block first_block(first_largest), second_block(second_largest);
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    uint32_t low[4], high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = fusedstep::Quantizer<8, true>::quantize<uint32_t>(m[4 * w + i], first_block);
      high[i] = fusedstep::Quantizer<8, false>::quantize<uint32_t>(v[4 * w + i], second_block);
    }
    first.words[w] = __byte_perm(__byte_perm(low[0], low[1], 0x0040), __byte_perm(low[2], low[3], 0x0040), 0x5410);
    second.words[w] = __byte_perm(__byte_perm(high[0], high[1], 0x0040), __byte_perm(high[2], high[3], 0x0040), 0x5410);
  }
  param.store(a.param, a.rest, at, p);
  first.store(static_cast<uint8_t*>(a.first) + at);
  second.store(static_cast<uint8_t*>(a.second) + at);
  if (threadIdx.x % 32 == 0) {
    a.first_scales[block] = Block::scale(first_largest);
    a.second_scales[block] = Block::scale(second_largest);
  }
}

template <bool kZero>
__global__ void __launch_bounds__(kThreads, 4) adamw_average(Arrays a, int64_t n, float weight, Scalars s) {
  const int64_t at = place(4);
  if (at >= n) return;
  Words<float, 4> param, grad, first, second, average;
  param.load(static_cast<float*>(a.param) + at);
  grad.load(static_cast<const float*>(a.grad) + at);
  first.load(static_cast<float*>(a.first) + at);
  second.load(static_cast<float*>(a.second) + at);
  average.load(a.average + at);
  float p[4], m[4], v[4], e[4], none = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    p[i] = param.get(i), m[i] = first.get(i), v[i] = second.get(i), e[i] = average.get(i);
    Rule::update(p[i], grad.get(i), m[i], v[i], none, s);
    e[i] = e[i] + weight * (p[i] - e[i]);
  }
  param.put(p), first.put(m), second.put(v), average.put(e);
  param.store(static_cast<float*>(a.param) + at);
  first.store(static_cast<float*>(a.first) + at);
  second.store(static_cast<float*>(a.second) + at);
  average.store(a.average + at);
  if (kZero) Words<float, 4>{}.store(static_cast<float*>(const_cast<void*>(a.grad)) + at);
}

// The sum over a warp.
template <class T>
__device__ __forceinline__ T over_warp(T x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// The sum of squares and the largest magnitude: eight vectors a thread asked for at once, fp32 within a vector, fp64
// beyond.
template <class G>
__global__ void __launch_bounds__(kThreads, 4) norm(const G* grads, double* partial, float inverse, int64_t n) {
  constexpr int kN = 16 / sizeof(G), kPacks = 8;
  __shared__ double sums[kThreads / 32];
  const int64_t at = int64_t{blockIdx.x} * kThreads * kN * kPacks + threadIdx.x * kN;
  if (at >= n) return;
  Words<G, kN> packs[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) packs[k].load(grads + at + k * kThreads * kN);
  double sum = 0.0;
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float grad = packs[k].get(i), unscaled = grad * inverse;
      squares += unscaled * unscaled;
      asm("{ .reg .f32 size; abs.f32 size, %1; max.NaN.f32 %0, %0, size; }" : "+f"(largest) : "f"(grad));
    }
    sum += squares;
  }
  sum = over_warp(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) sum += sums[warp];
    partial[2 * blockIdx.x] = sum;
  }
  if (threadIdx.x % 32 == 0) partial[2 * blockIdx.x + 1] = largest;
}

// Squares by rows and by columns, and of the parameter: a block has 64 rows of one vector for each thread.
template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    sums(const S* params, const S* grads, float* by_row, float* by_column, double* of_param, int strips, int columns) {
  constexpr int kN = 16 / sizeof(S), kRows = 64, kAhead = 8;
  const int strip = blockIdx.x % strips, band = blockIdx.x / strips, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t{band} * kRows * columns + (strip * kThreads + threadIdx.x) * kN;
  float column[kN] = {};
  double squares = 0.0;
#pragma unroll 1
  for (int row = 0; row < kRows; row += kAhead) {
    Words<S, kN> grad[kAhead], param[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      grad[k].load(grads + first + int64_t{row + k} * columns);
      param[k].load(params + first + int64_t{row + k} * columns);
    }
    float of_params = 0.0f;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float square = grad[k].get(i) * grad[k].get(i);
        column[i] += square;
        sum += square;
        of_params += param[k].get(i) * param[k].get(i);
      }
      sum = over_warp(sum);
      if (lane == 0) by_row[(int64_t{band * kRows + row + k} * strips + strip) * (kThreads / 32) + warp] = sum;
    }
    squares += of_params;
  }
#pragma unroll
  for (int i = 0; i < kN; ++i)
    by_column[int64_t{band} * columns + (strip * kThreads + threadIdx.x) * kN + i] = column[i];
  of_param[int64_t{blockIdx.x} * kThreads + threadIdx.x] = squares;
}

using Reducing = fusedstep::Adafactor<false>;
constexpr int kBand = 8;  // rows of a block

// The sum of the squares of the update: a thread has one vector of columns.
template <class S>
__global__ void __launch_bounds__(kThreads, 4)
    squares(const S* grads, const float* by_row, const float* by_column, const float* of_matrix, double* of_update,
            int apart, int strips, int columns, Reducing::Scalars<float> s) {
  constexpr int kN = 16 / sizeof(S);
  const int strip = blockIdx.x % strips, band = blockIdx.x / strips, column = (strip * kThreads + threadIdx.x) * kN;
  const int64_t first = int64_t{band} * kBand * columns + column;
  Words<S, kN> grad[kBand];
  Words<float, kN> factors;
#pragma unroll
  for (int k = 0; k < kBand; ++k) grad[k].load(grads + first + int64_t{k} * columns);
  factors.load(by_column + column);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kBand; ++k) {
    const float row = by_row[band * kBand + k * apart] * *of_matrix;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float factor = row * factors.get(i), direction = Reducing::direction(grad[k].get(i), &factor, s);
      sum += direction * direction;
    }
  }
  const double of_warp = over_warp(static_cast<double>(sum));
  if (threadIdx.x % 32 == 0) of_update[int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32] = of_warp;
}

// The update.
template <class S>
__global__ void __launch_bounds__(kThreads, 4)
    apply(S* params, const S* grads, const float* by_row, const float* by_column, const float* of_matrix, int apart,
          int strips, int columns, Reducing::Scalars<float> s, Reducing::Finish<float> f) {
  constexpr int kN = 16 / sizeof(S), kRows = kBand / 2;
  const int strip = blockIdx.x % strips, band = blockIdx.x / strips, column = (strip * kThreads + threadIdx.x) * kN;
  const int64_t first = int64_t{band} * kRows * columns + column;
  Words<S, kN> grad[kRows], param[kRows];
  Words<float, kN> factors;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    grad[k].load(grads + first + int64_t{k} * columns);
    param[k].load(params + first + int64_t{k} * columns);
  }
  factors.load(by_column + column);
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const float row = by_row[band * kRows + k * apart] * *of_matrix;
    float numbers[kN], none = 0.0f;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float factor = row * factors.get(i);
      numbers[i] = param[k].get(i);
      Reducing::update(numbers[i], grad[k].get(i), &factor, none, s, f);
    }
    param[k].put(numbers);
    param[k].store(params + first + int64_t{k} * columns);
  }
}

template __global__ void adamw<float, float, float>(Arrays, int64_t, Scalars);
template __global__ void adamw<BF16, BF16, BF16>(Arrays, int64_t, Scalars);
template __global__ void adamw<float, float, BF16>(Arrays, int64_t, Scalars);
template __global__ void adamw<float, BF16, float>(Arrays, int64_t, Scalars);
template __global__ void adamw<Split, BF16, float>(Arrays, int64_t, Scalars);
template __global__ void adamw<Split, BF16, BF16>(Arrays, int64_t, Scalars);
template __global__ void adamw_8bit<BF16, BF16>(Arrays, int64_t, Scalars);
template __global__ void adamw_8bit<Split, BF16>(Arrays, int64_t, Scalars);
template __global__ void adamw_8bit<float, float>(Arrays, int64_t, Scalars);
template __global__ void adamw_average<false>(Arrays, int64_t, float, Scalars);
template __global__ void adamw_average<true>(Arrays, int64_t, float, Scalars);
template __global__ void norm<float>(const float*, double*, float, int64_t);
#define REDUCING(S)                                                                                               \
  template __global__ void sums<S>(const S*, const S*, float*, float*, double*, int, int);                        \
  template __global__ void squares<S>(const S*, const float*, const float*, const float*, double*, int, int, int, \
                                      Reducing::Scalars<float>);                                                  \
  template __global__ void apply<S>(S*, const S*, const float*, const float*, const float*, int, int, int,        \
                                    Reducing::Scalars<float>, Reducing::Finish<float>);
REDUCING(float)
REDUCING(BF16)

}  // namespace lab

// Learning-rate schedules: what python/fusedstep/schedules/schedule.py evaluates, operation by operation, so that host
// and device give the same bits. A schedule is a list of pieces; each is a row of numbers.
#pragma once

#include <cmath>

#include "arithmetic.h"

namespace fusedstep {

// start, kind, high, low, offset, length, exponent. With u updates since `start` and x = (u + offset) / length:
constexpr int kPieceNumbers = 7;
constexpr double kPower = 0.0;     // low + (high - low) x^(exponent / 2)
constexpr double kCosine = 1.0;    // low + (high - low) (1 + cos(pi exponent x)) / 2
constexpr double kRestarts = 2.0;  // the same with the fractional part of exponent x
constexpr double kFactor = 3.0;    // max(low, high exponent^(u + offset))

inline namespace FUSEDSTEP_ISA {

template <int kN>
FUSEDSTEP_FN double horner(const double (&coefficients)[kN], double x) {
  double result = coefficients[kN - 1];
  for (int i = kN - 2; i >= 0; --i) result = result * x + coefficients[i];
  return result;
}

// cos(pi x), from Taylor series on [0, 1/4].
FUSEDSTEP_FN double cos_pi(double x) {
  const double cosine[] = {1.0,
                           -4.934802200544679,
                           4.0587121264167685,
                           -1.3352627688545895,
                           0.2353306303588932,
                           -0.02580689139001406,
                           0.0019295743094039231,
                           -0.0001046381049248457,
                           4.303069587032947e-06,
                           -1.3878952462213771e-07};
  const double sine[] = {3.141592653589793,      -5.16771278004997,       2.5501640398773455,
                         -0.5992645293207921,    0.08214588661112823,     -0.0073704309457143504,
                         0.00046630280576761255, -2.1915353447830217e-05, 7.952054001475513e-07};
  x = x < 0.0 ? -x : x;
  x = x - 2.0 * floor(0.5 * x);
  if (x > 1.0) x = 2.0 - x;
  double sign = 1.0;
  if (x > 0.5) {
    x = 1.0 - x;
    sign = -1.0;
  }
  if (x <= 0.25) return sign * horner(cosine, x * x);
  x = 0.5 - x;
  return sign * (x * horner(sine, x * x));
}

// x^(exponent / 2) of a whole exponent.
FUSEDSTEP_FN double half_power(double x, double exponent) {
  const int64_t count = static_cast<int64_t>(exponent < 0.0 ? -exponent : exponent);
  double result = power(x, count / 2);
  if (count % 2 == 1) result = result * square_root(x);
  return exponent < 0.0 ? 1.0 / result : result;
}

// The learning rate of update `t`: the last of the pieces that began at or before it decides.
FUSEDSTEP_FN double evaluate_schedule(const double* pieces, int64_t n, double t) {
  const double* p = pieces;
  for (int64_t i = 1; i < n; ++i) {
    if (pieces[i * kPieceNumbers] <= t) p = pieces + i * kPieceNumbers;
  }
  const double kind = p[1], high = p[2], low = p[3], length = p[5], exponent = p[6];
  const double since = t - p[0] + p[4];
  if (kind == kFactor) {
    const double lr = high * power(exponent, static_cast<int64_t>(since));
    return lr > low ? lr : low;
  }
  if (kind == kPower) return low + (high - low) * half_power(since / length, exponent);
  double turns = exponent * (since / length);
  if (kind == kRestarts) turns = turns - floor(turns);
  return low + (high - low) * (0.5 * (1.0 + cos_pi(turns)));
}

// Counts a step of group `i` of `n` and evaluates its schedule for the next one. values: n counts, then n learning
// rates. table: for each group where its pieces begin, then for each group the number of its pieces and their rows.
FUSEDSTEP_FN void advance_schedule(double* values, const double* table, int64_t n, int64_t i) {
  const double* pieces = table + static_cast<int64_t>(table[i]);
  const double count = values[i] + 1.0;
  values[i] = count;
  values[n + i] = evaluate_schedule(pieces + 1, static_cast<int64_t>(pieces[0]), count);
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep

// The product of a few rows of activations with a weight, in float32: y[r, o] = Σ x[r, i] w[o, i].
//
// Decoding takes the time of reading every weight. So a weight is read once, as it is stored, and
// becomes what is multiplied in registers only, a unit of 32 numbers at a time. Processors that
// multiply pairs of bfloat16 do so where activations are bfloat16: every number of a weight in few
// bits is one, and every product of two is a float32. Each sum is taken in an order that depends on
// the shape and format of the weight and on the dtype of the activations, not on the number of rows
// or of threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "Sums are rounded once for each product: that takes an instruction for both."
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "A bfloat16 is taken to be the later half of a float32."
#endif

namespace {

namespace ffi = xla::ffi;
using Index = int64_t;

constexpr Index kLanes = 16, kUnit = 2 * kLanes;  // numbers of a vector, and those read at once
constexpr Index kLine = 64;                       // bytes of a line of the cache
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// Sums stay in registers only if no index of them is a variable.
#define UNROLLED _Pragma("GCC unroll 16")

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// --- Formats: what the numbers of a unit are -----------------------------------------------------

// A unit in float32.
struct Wide {
  Floats lower, upper;
};

// Compilers make several instructions of what some processors have one for.
inline Words from_int8(const char* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepi8_epi32(load<__m128i>(from));
#else
  return __builtin_convertvector(load<Bytes>(from), Words);
#endif
}

inline Words from_uint16(const char* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(load<__m256i>(from));
#else
  return __builtin_convertvector(load<Halves>(from), Words);
#endif
}

inline Floats floats(Words words) { return __builtin_convertvector(words, Floats); }

// `kHalves` units are read from `kBytes` bytes; `half` is which of them.
struct Float32 {
  static constexpr int kBytes = 4 * kUnit, kHalves = 1;
  static Wide wide(const char* from, int) {
    return {load<Floats>(from), load<Floats>(from + kBytes / 2)};
  }
};

struct BFloat16 {
  static constexpr int kBytes = 2 * kUnit, kHalves = 1;
  static Wide wide(const char* from, int) {
    return {number(from), number(from + kBytes / 2)};
  }
  static Floats number(const char* from) {
    return reinterpret_cast<Floats>(from_uint16(from) << 16);
  }
};

struct Int8 {
  static constexpr int kBytes = kUnit, kHalves = 1;
  static Wide wide(const char* from, int) {
    return {floats(from_int8(from)), floats(from_int8(from + kBytes / 2))};
  }
};

// In a byte, below, a number of the first half of a row; above, one of the second half.
struct Int4 {
  static constexpr int kBytes = kUnit, kHalves = 2;
  static Wide wide(const char* from, int half) {
    return {number(from, half), number(from + kBytes / 2, half)};
  }
  static Floats number(const char* from, int half) {
    const Words bytes = from_int8(from);
    return floats(half ? bytes >> 4 : bytes << 28 >> 28);
  }
};

// --- Arithmetic: how a unit is multiplied --------------------------------------------------------

struct OfFloats {
  using Number = float;
  using Unit = Wide;

  template <class Format>
  static Unit weights(const char* from, int half) {
    return Format::wide(from, half);
  }
  static Unit activations(const float* x) { return {load<Floats>(x), load<Floats>(x + kLanes)}; }
  static Floats sum(Floats sum, const Unit& weights, const Unit& x) {
    return weights.upper * x.upper + (weights.lower * x.lower + sum);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_PAIRS 1

struct OfPairs {
  using Number = uint16_t;
  using Unit = __m512i;

  template <class Format>
  static Unit weights(const char* from, int half) {
    if constexpr (std::is_same_v<Format, BFloat16>) return _mm512_loadu_si512(from);
    if constexpr (std::is_same_v<Format, Int4>) return of_nibbles(from, half);
    const Wide wide = Format::wide(from, half);
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)wide.upper, (__m512)wide.lower);
  }
  static Unit of_nibbles(const char* from, int half) {
    // From 0 to 7 and −8 to −1, twice: of the five bits of an index, the highest does not count.
    alignas(64) static constexpr uint16_t kNumbers[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,  //
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  //
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,  //
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i index = half ? _mm512_srli_epi16(bytes, 4) : bytes;
    return _mm512_permutexvar_epi16(index, _mm512_load_si512(kNumbers));
  }
  static Unit activations(const uint16_t* x) { return _mm512_loadu_si512(x); }
  static Floats sum(Floats sum, const Unit& weights, const Unit& x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)x);
  }
};
#endif

// --- Scales: one for all numbers, or a float16 for each unit of a row ----------------------------

struct Unscaled {
  static constexpr bool kScaled = false;
};

struct Scaled {
  static constexpr bool kScaled = true;
  const uint16_t* scale;
  Index groups, half;  // of a row, and of its first half
};

// Float16 moved to the bits of a float32, but for its sign, is 2^112 times too small.
inline Floats from_float16(const uint16_t* from) {
  const Words words = from_uint16(reinterpret_cast<const char*>(from));
  const Words sign = (words & 0x8000) << 16, bits = (words & 0x7fff) << 13;
  const Words small = bits < 1 << 23;  // -1 where true: below the smallest normal number
  const Words moved = bits + (112 << 23) - (small << 23);
  const Floats size = reinterpret_cast<Floats>(moved) -
                      reinterpret_cast<Floats>(small & (113 << 23));
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(size) | sign);
}

std::vector<float> scales_of(const Scaled& scale, Index from, Index to) {
  const Index count = (to - from) * scale.groups, whole = count / kLanes * kLanes;
  const uint16_t* halves = scale.scale + from * scale.groups;
  std::vector<float> scales(whole + kLanes);
  const auto move = [&](const uint16_t* some, Index i) {
    const Floats wide = from_float16(some);
    std::memcpy(scales.data() + i, &wide, sizeof wide);
  };
  for (Index i = 0; i < whole; i += kLanes) move(halves + i, i);
  uint16_t last[kLanes] = {};
  std::memcpy(last, halves + whole, (count - whole) * sizeof *last);
  move(last, whole);
  return scales;
}

std::vector<float> scales_of(const Unscaled&, Index, Index) { return {}; }

// --- Sums of all lanes ---------------------------------------------------------------------------

#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Vectors consist of parts of 2 · width lanes. Each becomes one of half as many lanes, the lower
// added to the upper: those of `a`, then those of `b`.
inline Floats halved(Floats a, Floats b, int width) {
  switch (width) {
    case 8:
      return SHUFFLED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             SHUFFLED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    case 4:
      return SHUFFLED(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             SHUFFLED(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    case 2:
      return SHUFFLED(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
             SHUFFLED(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    default:
      return SHUFFLED(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
             SHUFFLED(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
}

// The sum of all lanes of vector k in lane k. Their number N is a power of two up to 16.
template <int N>
inline Floats all_lanes(Floats (&sums)[N]) {
  int count = N;
  UNROLLED for (int width = kLanes / 2; width; width /= 2) {
    const int pairs = std::max(1, count / 2);
    UNROLLED for (int k = 0; k < pairs; ++k) {
      sums[k] = count > 1 ? halved(sums[2 * k], sums[2 * k + 1], width)
                          : halved(sums[k], sums[k], width);
    }
    count = pairs;
  }
  return sums[0];
}

// --- Weights with all numbers of an output in a row ----------------------------------------------

constexpr Index kAhead = 8192;  // bytes until those come from memory that are asked for now

// Some of the outputs of a weight.
template <class Format, class Scale, class Math>
struct ByOutput {
  using Number = typename Math::Number;

  const char* weight;
  Scale scale;
  const float* scales;  // of these outputs, in float32
  Index bytes, outputs;  // bytes of one output
  Index stride, half;    // numbers from one row of activations to the next, and to its second half

  static constexpr Index kBytes = Format::kBytes;
  static constexpr int kHalves = Format::kHalves;

  float scale_of(Index output, Index unit, int half) const {
    // Beyond the last group of a row activations are zeros.
    const Index group = half ? std::min(scale.half + unit, scale.groups - 1) : unit;
    return scales[output * scale.groups + group];
  }

  // Unit `u` of R rows with O outputs, which begin `apart` bytes apart.
  template <int R, int O>
  inline void unit(const char* from, Index apart, const Number* x, Index output, Index u,
                   Floats (&sums)[R * O]) const {
    UNROLLED for (int h = 0; h < kHalves; ++h) {
      typename Math::Unit weights[O];
      UNROLLED for (int o = 0; o < O; ++o) {
        weights[o] = Math::template weights<Format>(from + o * apart, h);
        for (Index line = 0; h == 0 && line < kBytes; line += kLine) {
          __builtin_prefetch(from + o * apart + kAhead + line);
        }
      }
      UNROLLED for (int r = 0; r < R; ++r) {
        const auto activations = Math::activations(x + r * stride + h * half + u * kUnit);
        UNROLLED for (int o = 0; o < O; ++o) {
          Floats& sum = sums[r * O + o];
          if constexpr (Scale::kScaled) {
            sum += scale_of(output + o, u, h) * Math::sum(Floats{}, weights[o], activations);
          } else {
            sum = Math::sum(sum, weights[o], activations);
          }
        }
      }
    }
  }

  template <int R, int O>
  void some(const Number* x, float* y, Index output) const {
    Floats sums[R * O] = {};
    const char* from = weight + output * bytes;
    const Index whole = bytes / kBytes;
    for (Index u = 0; u < whole; ++u) unit<R, O>(from + u * kBytes, bytes, x, output, u, sums);
    if (const Index rest = bytes % kBytes) {
      char last[O][kBytes] = {};
      for (int o = 0; o < O; ++o) std::memcpy(last[o], from + o * bytes + whole * kBytes, rest);
      unit<R, O>(last[0], kBytes, x, output, whole, sums);
    }
    const Floats all = all_lanes(sums);
    float each[kLanes];
    std::memcpy(each, &all, sizeof all);
    for (int r = 0; r < R; ++r) {
      for (int o = 0; o < O; ++o) y[r * outputs + output + o] = each[r * O + o];
    }
  }

  // y [R, outputs]
  template <int R>
  void rows(const Number* x, float* y) const {
    constexpr int kTogether = std::min(4, 16 / R);  // as many as there are registers for
    Index output = 0;
    for (; output + kTogether <= outputs; output += kTogether) some<R, kTogether>(x, y, output);
    for (; output < outputs; ++output) some<R, 1>(x, y, output);
  }
};

// --- Weights with a row for each input -----------------------------------------------------------

constexpr Index kRowsAhead = 32;  // the same in rows of a weight

template <class Format>
struct ByInput {
  const char* weight;
  Index inputs, outputs;

  template <int R, int C>
  void some(const float* x, float* y, Index stride, Index from, Index count) const {
    Wide sums[R][C] = {};
    constexpr Index kBytes = Format::kBytes;
    const char* row = weight + from * kBytes / kUnit;
    const bool whole = count == C * kUnit;
    const Index apart = outputs * kBytes / kUnit;
    char last[C * kBytes] = {};
    for (Index i = 0; i < inputs; ++i, row += apart) {
      for (Index line = 0; line < C * kBytes; line += kLine) {
        __builtin_prefetch(row + kRowsAhead * apart + line);
      }
      if (!whole) std::memcpy(last, row, count * kBytes / kUnit);
      const char* all = whole ? row : last;
      UNROLLED for (int c = 0; c < C; ++c) {
        const Wide weights = Format::wide(all + c * kBytes, 0);
        UNROLLED for (int r = 0; r < R; ++r) {
          sums[r][c].lower += weights.lower * x[r * inputs + i];
          sums[r][c].upper += weights.upper * x[r * inputs + i];
        }
      }
    }
    for (int r = 0; r < R; ++r) std::memcpy(y + r * stride + from, sums[r], count * sizeof *y);
  }

  template <int R>
  void rows(const float* x, float* y, Index stride, Index from, Index to) const {
    constexpr int kTogether = std::max(1, 8 / R);
    constexpr Index kMany = kTogether * kUnit;
    for (; from + kMany <= to; from += kMany) some<R, kTogether>(x, y, stride, from, kMany);
    for (; from < to; from += kUnit) some<R, 1>(x, y, stride, from, std::min(kUnit, to - from));
  }
};

// --- All rows, on all threads --------------------------------------------------------------------

template <int R>
using Count = std::integral_constant<int, R>;

// Calls `work(R, r)` for the rows from r to r + R, until all are done.
template <class Work>
void in_groups(Index rows, const Work& work) {
  Index r = 0;
  for (; r + 8 <= rows; r += 8) work(Count<8>(), r);
  if (r + 4 <= rows) work(Count<4>(), r), r += 4;
  if (r + 2 <= rows) work(Count<2>(), r), r += 2;
  if (r < rows) work(Count<1>(), r);
}

// Calls `work(part)` for all parts, on this thread and on those of the pool that are free. Nothing
// is waited for that has not begun: all threads of a pool may be here at once.
template <class Work>
void in_parallel(ffi::ThreadPool& pool, Index parts, const Work& work) {
  struct Counts {
    std::atomic<Index> begun{0}, done{0};
  };
  const auto counts = std::make_shared<Counts>();
  const auto take = [counts, parts, &work] {
    for (Index part; (part = counts->begun.fetch_add(1)) < parts;) {
      work(part);
      counts->done.fetch_add(1);
    }
  };
  for (Index k = 1; k < std::min(parts, pool.num_threads()); ++k) pool.Schedule([take] { take(); });
  take();
  for (int tries = 0; counts->done.load() < parts; ++tries) {
    if (tries > 10000) std::this_thread::yield();
  }
}

Index divided(Index size, Index by) { return (size + by - 1) / by; }

constexpr Index kPart = 1 << 16;  // bytes that are worth another thread

// Rows filled up with zeros to `stride` numbers, from the beginning of a line of the cache on.
template <class Number>
struct Filled {
  std::vector<Number> memory;
  Number* first;

  Filled(const Number* x, Index rows, Index inputs, Index stride)
      : memory(rows * stride + kLine / sizeof *x) {
    const auto begin = reinterpret_cast<uintptr_t>(memory.data());
    first = memory.data() + (kLine - begin % kLine) % kLine / sizeof *x;
    for (Index r = 0; r < rows; ++r) {
      std::memcpy(first + r * stride, x + r * inputs, inputs * sizeof *x);
    }
  }
};

template <class Math, class Format, class Scale>
void by_output(ffi::ThreadPool& pool, const char* weight, Scale scale, Index bytes,
               const typename Math::Number* x, float* y, Index rows, Index inputs, Index outputs) {
  // With a line more, rows of 4096 bytes do not begin at the same place of the cache.
  const Index half = divided(bytes, Format::kBytes) * kUnit;
  const Index stride = half * Format::kHalves + kLine / sizeof *x;
  const Filled all(x, rows, inputs, stride);
  const Index size = std::max<Index>(1, kPart / std::max<Index>(1, 4 * bytes)) * 4;
  in_parallel(pool, divided(outputs, size), [&](Index part) {
    const Index from = part * size, count = std::min(outputs - from, size);
    const auto scales = scales_of(scale, from, from + count);
    const ByOutput<Format, Scale, Math> product{
        weight + from * bytes, scale, scales.data(), bytes, count, stride, half};
    std::vector<float> some(rows * count);  // rows of `y` may be a power of two apart
    in_groups(rows, [&](auto group, Index r) {
      product.template rows<decltype(group)::value>(all.first + r * stride, &some[r * count]);
    });
    for (Index r = 0; r < rows; ++r) {
      std::memcpy(y + r * outputs + from, &some[r * count], count * sizeof *y);
    }
  });
}

struct Activations {
  const char* data;  // [rows, inputs], of bfloat16 or of float32
  bool in_bfloat16;
  Index rows, inputs;

  Activations part(Index from, Index count) const {
    return {data + from * inputs * (in_bfloat16 ? 2 : 4), in_bfloat16, count, inputs};
  }
};

Activations activations(const ffi::AnyBuffer& x) {
  return {static_cast<const char*>(x.untyped_data()), x.element_type() == ffi::BF16,
          x.dimensions()[0], x.dimensions()[1]};
}

// Activations in float32, whatever they are in.
std::vector<float> widened(const Activations& x) {
  std::vector<float> wide(x.rows * x.inputs);
  if (!x.in_bfloat16) {
    std::memcpy(wide.data(), x.data, wide.size() * sizeof(float));
    return wide;
  }
  const auto* from = reinterpret_cast<const uint16_t*>(x.data);
  for (size_t i = 0; i < wide.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(&wide[i], &bits, sizeof bits);
  }
  return wide;
}

// In pairs of bfloat16 where the processor can and the weight has no more digits.
template <class Format, class Scale>
void by_output(ffi::ThreadPool& pool, const char* weight, Scale scale, Index bytes,
               const Activations& x, float* y, Index outputs) {
#ifdef HAS_PAIRS
  if (x.in_bfloat16 && !std::is_same_v<Format, Float32>) {
    const auto* pairs = reinterpret_cast<const uint16_t*>(x.data);
    return by_output<OfPairs, Format>(pool, weight, scale, bytes, pairs, y, x.rows, x.inputs,
                                      outputs);
  }
#endif
  const auto wide = widened(x);
  by_output<OfFloats, Format>(pool, weight, scale, bytes, wide.data(), y, x.rows, x.inputs,
                              outputs);
}

template <class Format>
void by_input(ffi::ThreadPool& pool, const char* weight, const float* x, float* y, Index rows,
              Index matrices, Index inputs, Index outputs) {
  constexpr Index kColumns = 8 * kUnit;  // as many as one row has registers for
  const Index parts = divided(outputs, kColumns), stride = matrices * outputs;
  const Index bytes = inputs * outputs * Format::kBytes / kUnit;
  in_parallel(pool, matrices * parts, [&](Index part) {
    const Index matrix = part / parts, from = part % parts * kColumns;
    const ByInput<Format> product{weight + matrix * bytes, inputs, outputs};
    const Index to = std::min(outputs, from + kColumns);
    in_groups(rows, [&](auto count, Index r) {
      float* some = y + r * stride + matrix * outputs;
      product.template rows<decltype(count)::value>(x + r * inputs, some, stride, from, to);
    });
  });
}

// --- What is called ------------------------------------------------------------------------------

using Result = ffi::Result<ffi::BufferR2<ffi::F32>>;

bool is_known(const ffi::AnyBuffer& x) {
  const auto dtype = x.element_type();
  return x.dimensions().size() == 2 && (dtype == ffi::F32 || dtype == ffi::BF16);
}

// x [rows, inputs], y [rows, matrices · outputs], and a weight of any rank, whose axes amount to
// [matrices, inputs, outputs]. Matrices of one output each are the rows of one matrix.
template <class Format>
void plain(ffi::ThreadPool& pool, const Activations& x, const char* weight, float* y,
           Index matrices, Index outputs) {
  if (outputs == 1) {
    const Index bytes = x.inputs * Format::kBytes / kUnit;
    by_output<Format>(pool, weight, Unscaled{}, bytes, x, y, matrices);
  } else {
    const auto wide = widened(x);
    by_input<Format>(pool, weight, wide.data(), y, x.rows, matrices, x.inputs, outputs);
  }
}

// Calls `work` with the format of a weight.
template <class Work>
ffi::Error with_format(ffi::DataType dtype, const Work& work) {
  switch (dtype) {
    case ffi::F32:
      work(Float32());
      break;
    case ffi::BF16:
      work(BFloat16());
      break;
    case ffi::S8:
      work(Int8());
      break;
    default:
      return ffi::Error::InvalidArgument("No kernel for weights of this dtype.");
  }
  return ffi::Error::Success();
}

ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, Result y,
                   Index each) {
  if (!is_known(x)) return ffi::Error::InvalidArgument("No kernel for activations like these.");
  const char* from = static_cast<const char*>(weight.untyped_data());
  const Index matrices = y->dimensions()[1] / each;
  return with_format(weight.element_type(), [&](auto format) {
    plain<decltype(format)>(pool, activations(x), from, y->typed_data(), matrices, each);
  });
}

// x [rows, inputs], weight [outputs, bytes], scale [outputs, groups], y [rows, outputs].
template <class Format>
ffi::Error grouped(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR2<ffi::S8> weight,
                   ffi::BufferR2<ffi::F16> scale, Result y) {
  if (!is_known(x)) return ffi::Error::InvalidArgument("No kernel for activations like these.");
  const Index outputs = weight.dimensions()[0], bytes = weight.dimensions()[1];
  const Index groups = scale.dimensions()[1];
  const Index half = Format::kHalves == 1 ? groups : bytes / kUnit;
  const Scaled each{reinterpret_cast<const uint16_t*>(scale.untyped_data()), groups, half};
  const char* from = static_cast<const char*>(weight.untyped_data());
  by_output<Format>(pool, from, each, bytes, activations(x), y->typed_data(), outputs);
  return ffi::Error::Success();
}

// --- Of several experts --------------------------------------------------------------------------

using Numbers = ffi::BufferR1<ffi::S32>;

// Calls `work(expert, r, count)` for the rows from r on that have one expert. An expert that is not
// there is the first or the last, as in slices of XLA.
template <class Work>
void by_expert(Numbers& expert, Index experts, const Work& work) {
  const int32_t* of = expert.typed_data();
  const Index rows = expert.dimensions()[0];
  for (Index r = 0, end; r < rows; r = end) {
    for (end = r + 1; end < rows && of[end] == of[r];) ++end;
    work(std::clamp<Index>(of[r], 0, experts - 1), r, end - r);
  }
}

// As `product`; the weight has an axis for experts in front, and row r is that of expert[r].
ffi::Error experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, Numbers expert,
                   Result y, Index each) {
  if (!is_known(x)) return ffi::Error::InvalidArgument("No kernel for activations like these.");
  const Index count = weight.dimensions()[0], outputs = y->dimensions()[1];
  const Index bytes = count ? weight.size_bytes() / count : 0;
  const char* from = static_cast<const char*>(weight.untyped_data());
  return with_format(weight.element_type(), [&](auto format) {
    by_expert(expert, count, [&](Index number, Index r, Index rows) {
      plain<decltype(format)>(pool, activations(x).part(r, rows), from + number * bytes,
                              y->typed_data() + r * outputs, outputs / each, each);
    });
  });
}

// As `grouped`; weight [experts, outputs, bytes], scale [experts, outputs, groups].
template <class Format>
ffi::Error grouped_of_experts(ffi::ThreadPool pool, ffi::AnyBuffer x,
                              ffi::BufferR3<ffi::S8> weight, ffi::BufferR3<ffi::F16> scale,
                              Numbers expert, Result y) {
  if (!is_known(x)) return ffi::Error::InvalidArgument("No kernel for activations like these.");
  const Index outputs = weight.dimensions()[1], bytes = weight.dimensions()[2];
  const Index groups = scale.dimensions()[2];
  const Index half = Format::kHalves == 1 ? groups : bytes / kUnit;
  const char* from = static_cast<const char*>(weight.untyped_data());
  const auto* scales = reinterpret_cast<const uint16_t*>(scale.untyped_data());
  by_expert(expert, weight.dimensions()[0], [&](Index number, Index r, Index rows) {
    const Scaled each{scales + number * outputs * groups, groups, half};
    by_output<Format>(pool, from + number * outputs * bytes, each, bytes,
                      activations(x).part(r, rows), y->typed_data() + r * outputs, outputs);
  });
  return ffi::Error::Success();
}

auto grouped_experts_call() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::BufferR3<ffi::S8>>()
      .Arg<ffi::BufferR3<ffi::F16>>()
      .Arg<Numbers>()
      .Ret<ffi::BufferR2<ffi::F32>>();
}

auto grouped_call() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::BufferR2<ffi::S8>>()
      .Arg<ffi::BufferR2<ffi::F16>>()
      .Ret<ffi::BufferR2<ffi::F32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<Index>("each"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_int8_groups, grouped<Int8>, grouped_call());
XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_int4_groups, grouped<Int4>, grouped_call());
XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_experts, experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Numbers>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<Index>("each"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_experts_int8_groups, grouped_of_experts<Int8>,
                              grouped_experts_call());
XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_experts_int4_groups, grouped_of_experts<Int4>,
                              grouped_experts_call());

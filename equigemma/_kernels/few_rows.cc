// The product of a few rows of activations with a weight, in float32: y[r, o] = Σ x[r, i] w[o, i].
//
// Decoding takes the time of reading every weight. So a weight is read once, as it is stored, and
// becomes float32 in registers only: 64 bytes are 16 words of 32 bits, and a word holds one or more
// numbers, which shifts take apart. Number `part` of all words is one vector. Each sum is taken in
// an order that depends on the shape and format of the weight alone, neither on the number of rows
// nor on threads or processor.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "Sums are rounded once for each product: that takes an instruction for both."
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The first number of a word is taken to be its lowest."
#endif

namespace {

namespace ffi = xla::ffi;
using Index = int64_t;

constexpr Index kWords = 16, kBlock = 4 * kWords;  // words and bytes of a block
typedef int32_t Words __attribute__((vector_size(kBlock)));
typedef float Floats __attribute__((vector_size(kBlock)));

// Sums stay in registers only if no index of them is a variable.
#define UNROLLED _Pragma("GCC unroll 8")

template <class Vector>
inline Vector load(const void* from, Index size = kBlock) {
  Vector block = {};
  std::memcpy(&block, from, size);
  return block;
}

// --- Formats: how many numbers a word has, what they are, where they belong in a row ------------

struct Float32 {
  static constexpr int kParts = 1;
  static Floats part(Words words, int) { return reinterpret_cast<Floats>(words); }
};

struct BFloat16 {
  static constexpr int kParts = 2;
  static Floats part(Words words, int part) {
    return reinterpret_cast<Floats>(part ? words & -65536 : words << 16);
  }
};

struct Int8 {
  static constexpr int kParts = 4;
  static Floats part(Words words, int part) {
    return __builtin_convertvector(words << (24 - 8 * part) >> 24, Floats);
  }
};

// Below, a number of the first half of a row; in the same byte above it, one of the second half.
struct Int4 {
  static constexpr int kParts = 8;
  static Floats part(Words words, int part) {
    const int bit = part < 4 ? 8 * part : 8 * (part - 4) + 4;
    return __builtin_convertvector(words << (28 - bit) >> 28, Floats);
  }
};

// The place of a number in a row whose halves, of formats that have them, begin `half` apart.
template <class Format>
inline Index place(Index block, int part, Index word, Index half) {
  constexpr int kTogether = std::min(Format::kParts, 4);
  const Index of_half = (block * kWords + word) * kTogether + part % kTogether;
  return part / kTogether * half + of_half;
}

struct Unscaled {
  static constexpr bool kScaled = false;
  Floats at(Index, Index, int) const { return Floats{}; }
};

inline float from_half(uint16_t half) {
  // Without its sign and moved to the bits of a float32, it is 2^112 times too small.
  uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  const bool subnormal = bits < 1u << 23;
  bits += (subnormal ? 113u : 112u) << 23;
  float size;
  std::memcpy(&size, &bits, sizeof size);
  if (subnormal) size -= 0x1p-14f;
  return half & 0x8000 ? -size : size;
}

// A float16 for every 32 numbers of a row: those of eight words.
struct Scaled {
  static constexpr bool kScaled = true;
  const uint16_t* scale;
  Index groups, half;  // of a row, and of its first half

  Floats at(Index output, Index block, int upper) const {
    const uint16_t* row = scale + output * groups;
    const Index first = upper * half + 2 * block, end = upper ? groups : half;
    const float a = first < end ? from_half(row[first]) : 0;
    const float b = first + 1 < end ? from_half(row[first + 1]) : 0;
    return Floats{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
  }
};

// --- Weights with all numbers of an output in a row ----------------------------------------------

// Activations in the order in which the words of a weight are taken apart, filled up with zeros.
template <class Format>
std::vector<Floats> in_order(const float* x, Index rows, Index inputs, Index blocks, Index half) {
  std::vector<Floats> ordered(rows * blocks * Format::kParts);
  for (Index r = 0, vector = 0; r < rows; ++r) {
    for (Index b = 0; b < blocks; ++b) {
      for (int part = 0; part < Format::kParts; ++part, ++vector) {
        for (Index word = 0; word < kWords; ++word) {
          const Index i = place<Format>(b, part, word, half);
          ordered[vector][word] = i < inputs ? x[r * inputs + i] : 0;
        }
      }
    }
  }
  return ordered;
}

template <class Format, class Scale>
struct ByOutput {
  const char* weight;
  Scale scale;
  Index bytes, blocks, outputs;  // bytes and blocks of one output

  // R rows with O outputs. `size` is that of the block: the last one may be short.
  template <int R, int O>
  inline void block(const Floats* x, Index output, Index b, Index size, Floats (&sums)[R][O]) const {
    constexpr int kTogether = std::min(Format::kParts, 4);
    UNROLLED for (int o = 0; o < O; ++o) {
      const Words words = load<Words>(weight + (output + o) * bytes + b * kBlock, size);
      UNROLLED for (int first = 0; first < Format::kParts; first += kTogether) {
        Floats partial[R];
        UNROLLED for (int r = 0; r < R; ++r) partial[r] = Scale::kScaled ? Floats{} : sums[r][o];
        UNROLLED for (int part = first; part < first + kTogether; ++part) {
          const Floats weights = Format::part(words, part);
          UNROLLED for (int r = 0; r < R; ++r) {
            partial[r] += weights * x[(r * blocks + b) * Format::kParts + part];
          }
        }
        const Floats each = scale.at(output + o, b, first / kTogether);
        UNROLLED for (int r = 0; r < R; ++r) {
          sums[r][o] = Scale::kScaled ? sums[r][o] + each * partial[r] : partial[r];
        }
      }
    }
  }

  template <int R, int O>
  void some(const Floats* x, float* y, Index output) const {
    Floats sums[R][O] = {};
    const Index whole = bytes / kBlock;
    for (Index b = 0; b < whole; ++b) block<R, O>(x, output, b, kBlock, sums);
    if (whole < blocks) block<R, O>(x, output, whole, bytes % kBlock, sums);
    for (int r = 0; r < R; ++r) {
      for (int o = 0; o < O; ++o) {
        Floats sum = sums[r][o];
        for (Index width = kWords / 2; width; width /= 2) {
          for (Index j = 0; j < width; ++j) sum[j] += sum[j + width];
        }
        y[r * outputs + output + o] = sum[0];
      }
    }
  }

  template <int R>
  void rows(const Floats* x, float* y, Index from, Index to) const {
    constexpr int kTogether = std::max(1, 4 / R);  // as many as there are registers for
    for (; from + kTogether <= to; from += kTogether) some<R, kTogether>(x, y, from);
    for (; from < to; ++from) some<R, 1>(x, y, from);
  }
};

// --- Weights with a row for each input -----------------------------------------------------------

template <class Format>
struct ByInput {
  const char* weight;
  Index inputs, outputs;

  template <int R, int C>
  void some(const float* x, float* y, Index stride, Index from, Index count) const {
    constexpr int kParts = Format::kParts;
    constexpr Index kNumbers = kWords * kParts;
    Floats sums[R][C][kParts] = {};
    const Index width = kBlock / kNumbers;  // bytes of a number
    const bool whole = count == C * kNumbers;
    for (Index i = 0; i < inputs; ++i) {
      const char* row = weight + (i * outputs + from) * width;
      UNROLLED for (int c = 0; c < C; ++c) {
        const Words words = whole ? load<Words>(row + c * kBlock) : load<Words>(row, count * width);
        UNROLLED for (int part = 0; part < kParts; ++part) {
          const Floats weights = Format::part(words, part);
          UNROLLED for (int r = 0; r < R; ++r) sums[r][c][part] += weights * x[r * inputs + i];
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (Index o = 0; o < count; ++o) {
        const Index word = o / kParts;
        y[r * stride + from + o] = sums[r][word / kWords][o % kParts][word % kWords];
      }
    }
  }

  template <int R>
  void rows(const float* x, float* y, Index stride, Index from, Index to) const {
    constexpr Index kNumbers = kWords * Format::kParts;
    constexpr int kTogether = std::max(1, 8 / R / Format::kParts);
    constexpr Index kMany = kTogether * kNumbers;
    for (; from + kMany <= to; from += kMany) some<R, kTogether>(x, y, stride, from, kMany);
    for (; from < to; from += kNumbers) {
      some<R, 1>(x, y, stride, from, std::min(kNumbers, to - from));
    }
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

template <class Format, class Scale>
void by_output(ffi::ThreadPool& pool, const char* weight, Scale scale, Index bytes, Index half,
               const float* x, float* y, Index rows, Index inputs, Index outputs) {
  const ByOutput<Format, Scale> product{weight, scale, bytes, divided(bytes, kBlock), outputs};
  const auto ordered = in_order<Format>(x, rows, inputs, product.blocks, half);
  const Index size = std::max<Index>(1, kPart / std::max<Index>(1, 4 * bytes)) * 4;
  in_parallel(pool, divided(outputs, size), [&](Index part) {
    const Index from = part * size, to = std::min(outputs, from + size);
    in_groups(rows, [&](auto count, Index r) {
      const Floats* some = ordered.data() + r * product.blocks * Format::kParts;
      product.template rows<decltype(count)::value>(some, y + r * outputs, from, to);
    });
  });
}

template <class Format>
void by_input(ffi::ThreadPool& pool, const char* weight, const float* x, float* y, Index rows,
              Index matrices, Index inputs, Index outputs) {
  constexpr Index kColumns = 8 * kWords;
  const Index parts = divided(outputs, kColumns), stride = matrices * outputs;
  const Index bytes = inputs * outputs * kBlock / (kWords * Format::kParts);
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

using Rows = ffi::BufferR2<ffi::F32>;
using Result = ffi::Result<Rows>;

// x [rows, inputs], y [rows, matrices · outputs], and a weight of any rank, whose axes amount to
// [matrices, inputs, outputs]. Matrices of one output each are the rows of one matrix.
template <class Format>
ffi::Error plain(ffi::ThreadPool& pool, Rows& x, ffi::AnyBuffer& weight, Result& y,
                 Index outputs) {
  const Index rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const Index matrices = y->dimensions()[1] / outputs;
  const char* from = static_cast<const char*>(weight.untyped_data());
  if (outputs == 1) {
    by_output<Format>(pool, from, Unscaled{}, inputs * 4 / Format::kParts, 0, x.typed_data(),
                      y->typed_data(), rows, inputs, matrices);
  } else {
    by_input<Format>(pool, from, x.typed_data(), y->typed_data(), rows, matrices, inputs, outputs);
  }
  return ffi::Error::Success();
}

ffi::Error product(ffi::ThreadPool pool, Rows x, ffi::AnyBuffer weight, Result y, Index each) {
  switch (weight.element_type()) {
    case ffi::F32:
      return plain<Float32>(pool, x, weight, y, each);
    case ffi::BF16:
      return plain<BFloat16>(pool, x, weight, y, each);
    case ffi::S8:
      return plain<Int8>(pool, x, weight, y, each);
    default:
      return ffi::Error::InvalidArgument("No kernel for weights of this dtype.");
  }
}

// x [rows, inputs], weight [outputs, bytes], scale [outputs, groups], y [rows, outputs].
template <class Format>
ffi::Error grouped(ffi::ThreadPool pool, Rows x, ffi::BufferR2<ffi::S8> weight,
                   ffi::BufferR2<ffi::F16> scale, Result y) {
  const Index outputs = weight.dimensions()[0], bytes = weight.dimensions()[1];
  const Index groups = scale.dimensions()[1], half = Format::kParts == 4 ? groups : bytes / 32;
  const Scaled each{reinterpret_cast<const uint16_t*>(scale.untyped_data()), groups, half};
  const char* from = static_cast<const char*>(weight.untyped_data());
  by_output<Format>(pool, from, each, bytes, bytes, x.typed_data(), y->typed_data(),
                    x.dimensions()[0], x.dimensions()[1], outputs);
  return ffi::Error::Success();
}

auto grouped_call() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Rows>()
      .Arg<ffi::BufferR2<ffi::S8>>()
      .Arg<ffi::BufferR2<ffi::F16>>()
      .Ret<Rows>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Rows>()
                                  .Attr<Index>("each"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_int8_groups, grouped<Int8>, grouped_call());
XLA_FFI_DEFINE_HANDLER_SYMBOL(equigemma_int4_groups, grouped<Int4>, grouped_call());

// Formula: y = max over the window of act((x - mean) * scale + bias), as torch.max_pool2d: first maximum, last NaN, no padding.
// Layout: rows of images in order; a thread owns output rows (forward), chunks (sums) or input rows (gradient).
// Bytes per element of x: forward one read, 1/stride^2 writes; backward two reads, one write; nothing normalised is written.
// Accumulate type: float (double for float64); the activation is rounded to the output type before it is compared.
// Invariants: sums do not depend on the number of threads; a gradient goes to exactly one position of its window.
#include "cpu/bn_act_maxpool.h"

#include <new>

#include "cpu/bn_kernel.h"

namespace fastres::cpu::FASTRES_LEVEL {

template <typename T>
class Line {
 public:
  explicit Line(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}))) {
    for (int64_t i = 0; i < count; ++i) data_[i] = T{};
  }
  ~Line() { ::operator delete(data_, std::align_val_t{64}); }
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// body(i, entry, lanes) for the elements of one row of x or grad_x.
template <bool kLast, int64_t L, typename scalar_t, typename Body>
FASTRES_INLINE void for_each_pixel(const BnActMaxpoolArgs& args, int64_t image, const scalar_t* out, bool stream, Body body) {
  const int64_t count = args.in_w * args.pixel;
  const int64_t step = kLast ? args.bn.cols : count;
  const int64_t channel = image % args.bn.channels;
  for (int64_t base = 0; base < count; base += step)
    for_each<L>(min(step, count - base), out + base, stream,
                [&](int64_t i, auto lanes) { body(base + i, kLast ? i : channel, lanes); });
}

// copy(at in a row, at in a line) for the pixels of a row, phase by phase.
template <typename Copy>
FASTRES_INLINE void for_each_place(const BnActMaxpoolArgs& args, Copy copy) {
  const int64_t stride = args.stride_w, pixel = args.pixel;
  for (int64_t phase = 0; phase < stride; ++phase) {
    const int64_t skipped = args.pad_w > phase ? (args.pad_w - phase + stride - 1) / stride : 0;  // columns of padding
    int64_t in_line = phase * args.phase_size + skipped * pixel;
    for (int64_t w = phase + skipped * stride - args.pad_w; w < args.in_w; w += stride, in_line += pixel)
      copy(w * pixel, in_line);
  }
}

// Where the even and the odd columns of a row go in a line of two phases: the compiler shuffles these loops.
template <typename T>
struct EvenOdd {
  T *even, *odd;
  EvenOdd(const BnActMaxpoolArgs& args, T* line)
      : even(line + args.pad_w % 2 * args.phase_size + args.pad_w / 2),
        odd(line + (args.pad_w + 1) % 2 * args.phase_size + (args.pad_w + 1) / 2) {}
};

// Copies a row of pixels into a line, and back.
template <bool kLast, typename T>
FASTRES_INLINE void split(const BnActMaxpoolArgs& args, const T* __restrict__ row, T* __restrict__ line) {
  if (!kLast && args.stride_w == 2) {
    const EvenOdd<T> to(args, line);
    const int64_t pairs = args.in_w / 2;
    for (int64_t k = 0; k < pairs; ++k) to.even[k] = row[2 * k];
    for (int64_t k = 0; k < pairs; ++k) to.odd[k] = row[2 * k + 1];
    if (args.in_w % 2) to.even[pairs] = row[2 * pairs];
    return;
  }
  for_each_place(args, [&, size = args.pixel * sizeof(T)](int64_t in_row, int64_t in_line) {
    if constexpr (kLast) memcpy(line + in_line, row + in_row, size);
    else line[in_line] = row[in_row];
  });
}
template <bool kLast, typename T>
FASTRES_INLINE void join(const BnActMaxpoolArgs& args, const T* __restrict__ line, T* __restrict__ row) {
  if (!kLast && args.stride_w == 2) {
    const EvenOdd<const T> from(args, line);
    const int64_t pairs = args.in_w / 2;
    for (int64_t k = 0; k < pairs; ++k) {
      row[2 * k] = from.even[k];
      row[2 * k + 1] = from.odd[k];
    }
    if (args.in_w % 2) row[2 * pairs] = from.even[pairs];
    return;
  }
  for_each_place(args, [&, size = args.pixel * sizeof(T)](int64_t in_row, int64_t in_line) {
    if constexpr (kLast) memcpy(row + in_row, line + in_line, size);
    else row[in_row] = line[in_line];
  });
}

// Taps between memory and lanes as wide as acc_t's.
template <typename acc_t, int64_t L>
using TapLanes = decltype(Vec<acc_t, L>{} < Vec<acc_t, L>{});
template <typename acc_t, int64_t L, typename Lanes>
FASTRES_INLINE TapLanes<acc_t, L> load_taps(const uint16_t* p, Lanes lanes) {
  const auto taps = move_in<Vec<uint16_t, L>>(p, lanes);
  if constexpr (sizeof(acc_t) == 4) return (TapLanes<acc_t, L>)to_32<L>(taps);
  else return __builtin_convertvector(taps, TapLanes<acc_t, L>);
}
template <typename acc_t, int64_t L, typename Lanes>
FASTRES_INLINE void store_taps(uint16_t* p, TapLanes<acc_t, L> taps, Lanes lanes) {
  if constexpr (sizeof(acc_t) == 4) move_out(p, to_16<L>((Vec<uint32_t, L>)taps), lanes);
  else move_out(p, __builtin_convertvector(taps, Vec<uint16_t, L>), lanes);
}

// The last kernel_h input rows of one image, activated, and x beside them where kKeepX.
template <bool kLast, bool kRelu, bool kKeepX, typename scalar_t>
class Ring {
  using acc_t = acc_of<scalar_t>;
  static constexpr int64_t L = kLanes<acc_t>;

 public:
  explicit Ring(const BnActMaxpoolArgs& args)
      : args_(args), row_(args.in_w * args.pixel), y_(args.kernel_h * args.line_size),
        x_(kKeepX ? args.kernel_h * args.line_size : 1) {
    for_each<L>(args.kernel_h * args.line_size, static_cast<scalar_t*>(y_), false, [&](int64_t i, auto lanes) {
      store<L>(y_ + i, Vec<acc_t, L>{} - static_cast<acc_t>(__builtin_inff()), lanes);  // padding, never the maximum
    });
  }

  const scalar_t* y() const { return y_; }
  const scalar_t* x() const { return x_; }

  // Makes the input rows [first, end) of an image available.
  void advance(int64_t image, int64_t first, int64_t end) {
    if (image != image_) next_ = 0;
    image_ = image;
    for (next_ = next_ < first ? first : next_; next_ < end; ++next_) activate(next_);
  }

 private:
  void activate(int64_t row) {
    const auto* mean = static_cast<const acc_t*>(args_.bn.mean);
    const auto* scale = static_cast<const acc_t*>(args_.bn.scale);
    const auto* bias = static_cast<const acc_t*>(args_.bn.bias);
    const auto* x = static_cast<const scalar_t*>(args_.bn.x) + (image_ * args_.in_h + row) * args_.in_w * args_.pixel;
    for_each_pixel<kLast, L>(args_, image_, x, false, [&](int64_t i, int64_t entry, auto lanes) {
      const auto z = normalise(load<acc_t, L>(x + i, lanes), channel_value<acc_t, L, kLast>(mean, entry),
                               channel_value<acc_t, L, kLast>(scale, entry), channel_value<acc_t, L, kLast>(bias, entry));
      store<L>(row_ + i, kRelu ? relu(z) : z, lanes);
    });
    const int64_t slot = row % args_.kernel_h * args_.line_size;
    split<kLast>(args_, static_cast<const scalar_t*>(row_), y_ + slot);
    if constexpr (kKeepX) split<kLast>(args_, x, x_ + slot);
  }

  const BnActMaxpoolArgs& args_;
  Line<scalar_t> row_, y_, x_;
  int64_t image_ = -1, next_ = 0;
};

// The input rows under one output row that exist, the first tap in them, and where in the ring they start.
struct Rows {
  int64_t first, end, tap, slot;
};
FASTRES_INLINE Rows window_rows(const BnActMaxpoolArgs& args, int64_t out_row) {
  const int64_t top = out_row * args.stride_h - args.pad_h;
  const int64_t first = top < 0 ? 0 : top;
  return {first, min(top + args.kernel_h, args.in_h), (first - top) * args.kernel_w,
          first % args.kernel_h * args.line_size};
}

// The maxima of L windows; found(better, offset, tap) for each tap, in scan order; `offset` into the lines of the ring.
template <int64_t L, typename acc_t, typename scalar_t, typename Found>
FASTRES_INLINE Vec<acc_t, L> scan_window(const BnActMaxpoolArgs& args, const scalar_t* lines, Rows rows, int64_t j,
                                         Found found) {
  Vec<acc_t, L> best = Vec<acc_t, L>{} - static_cast<acc_t>(__builtin_inff());
  int64_t slot = rows.slot;
  int tap = static_cast<int>(rows.tap);
  for (int64_t row = rows.first; row < rows.end; ++row) {
    for (int64_t column = 0; column < args.kernel_w; ++column) {
      const int64_t offset = slot + args.tap_offsets[column] + j;
      const auto v = load<acc_t, L>(lines + offset, Whole{});
      const auto better = (v > best) | (v != v);
      best = better ? v : best;
      found(better, offset, tap++);
    }
    slot += args.line_size;
    if (slot == args.kernel_h * args.line_size) slot = 0;
  }
  return best;
}

void bn_act_maxpool_forward(const BnActMaxpoolArgs& args, int64_t begin, int64_t end) {
  with_traits(args.bn, [&](const BnArgs&, auto type, auto last, auto is_relu) {
    using scalar_t = decltype(type);
    using acc_t = acc_of<scalar_t>;
    constexpr int64_t L = kLanes<acc_t>;
    Ring<last.value, is_relu.value, false, scalar_t> ring(args);
    const int64_t count = args.out_w * args.pixel;
    for (int64_t unit = begin; unit < end; ++unit) {
      const Rows rows = window_rows(args, unit % args.out_h);
      ring.advance(unit / args.out_h, rows.first, rows.end);
      auto* y = static_cast<scalar_t*>(args.bn.out) + unit * count;
      for_each<L>(count, y, args.stream_y, [&](int64_t j, auto lanes) {
        store<L>(y + j, scan_window<L, acc_t>(args, ring.y(), rows, j, [](auto...) {}), lanes);
      });
    }
  });
  if (args.stream_y) stream_fence();
}

// One output row of backward: finds the maxima again, writes their taps, and puts dz and dz * (x - mean) into lines.
template <bool kLast, bool kRelu, typename scalar_t>
class TapFinder {
  using acc_t = acc_of<scalar_t>;
  static constexpr int64_t L = kLanes<acc_t>;
  using Ints = TapLanes<acc_t, L>;

 public:
  explicit TapFinder(const BnActMaxpoolArgs& args)
      : args_(args), ring_(args), count_(args.out_w * args.pixel), first_(count_ + kColsMultiple),
        dz(count_ + kColsMultiple), dz_x(count_ + kColsMultiple) {
    for (int64_t j = 0; j < count_; ++j) {  // the first column of each window that is not padding
      const int64_t left = args.pad_w - j / args.pixel * args.stride_w;
      first_[j] = static_cast<uint16_t>(left > 0 ? left : 0);
    }
  }

  void run(int64_t unit) {
    const int64_t image = unit / args_.out_h;
    const Rows rows = window_rows(args_, unit % args_.out_h);
    ring_.advance(image, rows.first, rows.end);
    const auto* grad_y = static_cast<const scalar_t*>(args_.bn.grad_y) + unit * count_;
    const auto* mean = static_cast<const acc_t*>(args_.bn.mean);
    uint16_t* taps = args_.taps + unit * count_;
    const int64_t step = kLast ? args_.bn.cols : count_;
    for (int64_t base = 0; base < count_; base += step) {
      for_each<L>(min(step, count_ - base), taps, false, [&](int64_t i, auto lanes) {
        const int64_t j = base + i;
        Ints tap = load_taps<acc_t, L>(first_ + j, Whole{}) + static_cast<int>(rows.tap);
        Vec<acc_t, L> x{};
        const auto y = scan_window<L, acc_t>(args_, ring_.y(), rows, j, [&](auto better, int64_t offset, int position) {
          tap = better ? Ints{} + position : tap;
          x = better ? load<acc_t, L>(ring_.x() + offset, Whole{}) : x;
        });
        auto grad = load<acc_t, L>(grad_y + j, lanes);
        if constexpr (kRelu) {
          grad = relu_gradient(grad, y, acc_t{});
          tap = y <= acc_t{} ? Ints{} + kNoTap : tap;
        } else {  // nothing is above -infinity: the first position, as in torch
          for (int64_t lane = 0; lane < L && j + lane < count_; ++lane)
            if (y[lane] == -__builtin_inff())
              x[lane] = load<acc_t, 1>(ring_.x() + rows.slot + args_.tap_offsets[first_[j + lane]] + j + lane, Whole{})[0];
        }
        const auto x_centred = x - channel_value<acc_t, L, kLast>(mean, kLast ? i : image % args_.bn.channels);
        store_taps<acc_t, L>(taps + j, tap, lanes);
        store<L>(dz + j, grad, lanes);
        store<L>(dz_x + j, grad * x_centred, lanes);
      });
    }
  }

 private:
  const BnActMaxpoolArgs& args_;
  Ring<kLast, kRelu, true, scalar_t> ring_;
  int64_t count_;
  Line<uint16_t> first_;

 public:
  Line<acc_t> dz, dz_x;
};

void bn_act_maxpool_sums(const BnActMaxpoolArgs& args, int64_t begin, int64_t end) {
  with_traits(args.bn, [&](const BnArgs&, auto type, auto last, auto is_relu) {
    using scalar_t = decltype(type);
    using acc_t = acc_of<scalar_t>;
    constexpr int64_t L = kLanes<acc_t>;
    TapFinder<last.value, is_relu.value, scalar_t> finder(args);
    const int64_t count = args.out_w * args.pixel;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const Chunk<last.value> part(args.bn, chunk);
      part.clear();
      if constexpr (last.value) {
        const int64_t rows = args.images * args.out_h;
        for (int64_t unit = rows * chunk / args.bn.chunks; unit < rows * (chunk + 1) / args.bn.chunks; ++unit) {
          finder.run(unit);
          reduce_rows<acc_t, L, 4>(0, (count + args.bn.cols - 1) / args.bn.cols, args.bn.cols, count, part.sum_a, part.sum_b,
                                 [&](int64_t) {
                                   return [&](int64_t i, auto lanes) {
                                     return Pair<Vec<acc_t, L>>{load<acc_t, L>(finder.dz + i, lanes),
                                                                load<acc_t, L>(finder.dz_x + i, lanes)};
                                   };
                                 });
        }
      } else {
        part.for_each_plane([&](int64_t image, int64_t, double* sum_a, double* sum_b) {
          for (int64_t row = 0; row < args.out_h; ++row) {
            finder.run(image * args.out_h + row);
            reduce_plane<acc_t, L>(count, sum_a, sum_b, [&](int64_t i, auto lanes) {
              return Pair<Vec<acc_t, L>>{load<acc_t, L>(finder.dz + i, lanes), load<acc_t, L>(finder.dz_x + i, lanes)};
            });
          }
        });
      }
    }
  });
}

// dz of one input row, in a line: the gradients of those windows over it whose maximum lies in it.
template <int64_t L, typename scalar_t, typename acc_t>
FASTRES_INLINE void gather_dz(const BnActMaxpoolArgs& args, int64_t image, int64_t row, acc_t* dz) {
  const int64_t count = args.out_w * args.pixel;
  memset(dz, 0, args.line_size * sizeof(acc_t));
  const int64_t lowest = row + args.pad_h - args.kernel_h + 1;  // the window that has this row as its last one
  const int64_t first = lowest <= 0 ? 0 : (lowest + args.stride_h - 1) / args.stride_h;
  const int64_t last = min((row + args.pad_h) / args.stride_h, args.out_h - 1);
  for (int64_t out_row = first; out_row <= last; ++out_row) {
    const int64_t unit = image * args.out_h + out_row;
    const auto* grad_y = static_cast<const scalar_t*>(args.bn.grad_y) + unit * count;
    const uint16_t* taps = args.taps + unit * count;
    const int64_t kernel_row = row + args.pad_h - out_row * args.stride_h;
    for (int64_t column = 0; column < args.kernel_w; ++column) {
      acc_t* to = dz + args.tap_offsets[column];
      const auto wanted = static_cast<int>(kernel_row * args.kernel_w + column);
      for_each<L>(count, grad_y, false, [&](int64_t j, auto lanes) {
        const auto grad = load<acc_t, L>(grad_y + j, lanes);
        const auto tap = load_taps<acc_t, L>(taps + j, lanes);
        const auto sum = load<acc_t, L>(to + j, Whole{});
        store<L>(to + j, tap == wanted ? sum + grad : sum, Whole{});
      });
    }
  }
}

void bn_act_maxpool_gradient(const BnActMaxpoolArgs& args, int64_t begin, int64_t end) {
  with_layout(args.bn, [&](const BnArgs&, auto type, auto last) {
    with_bool(args.bn.training, [&](auto training) {
      using scalar_t = decltype(type);
      using acc_t = acc_of<scalar_t>;
      constexpr int64_t L = kLanes<acc_t>;
      constexpr bool kLast = last.value;
      Line<acc_t> line(args.line_size), dz_row(args.in_w * args.pixel);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t image = unit / args.in_h;
        gather_dz<L, scalar_t>(args, image, unit % args.in_h, static_cast<acc_t*>(line));
        join<kLast>(args, static_cast<const acc_t*>(line), static_cast<acc_t*>(dz_row));
        const int64_t offset = unit * args.in_w * args.pixel;
        const auto* x = static_cast<const scalar_t*>(args.bn.x);
        auto* grad_x = static_cast<scalar_t*>(args.bn.out) + offset;
        for_each_pixel<kLast, L>(args, image, grad_x, args.bn.stream, [&](int64_t i, int64_t entry, auto lanes) {
          const auto slope = load_slope<training.value, acc_t, L, kLast>(args.bn, entry);
          Vec<acc_t, L> x_{};
          if constexpr (training.value) x_ = load<acc_t, L>(x + offset + i, lanes);
          store<L>(grad_x + i, slope(load<acc_t, L>(dz_row + i, lanes), x_), lanes);
        });
      }
    });
  });
  if (args.bn.stream) stream_fence();
}

}  // namespace fastres::cpu::FASTRES_LEVEL

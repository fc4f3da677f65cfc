// What convolutions of images are told of them. No torch, no CUDA headers.
#pragma once

namespace fastres::cuda {

// One direction of a window.
struct Span {
  int kernel, stride, padding, dilation;

  int out(int size) const { return (size + padding + last() - 1) / stride + 1; }
  // Where the last window may begin, relative to the last pixel.
  int last() const { return padding - (kernel - 1) * dilation; }
};
struct Window {
  Span h, w;
};
struct Images {
  int count, height, width, channels;
};

}  // namespace fastres::cuda

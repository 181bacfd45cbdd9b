// What the bindings see of the CUDA attention head. Plain C++, so that they compile without the CUDA headers.
#pragma once

#include "../head.h"

namespace dan_fast {

// The whole head, and its derivative, for maps of S. They launch on `stream` (a cudaStream_t) and do not wait. All
// pointers are device memory of the current device; `workspace` has workspace_bytes for the direction, aligned to 256.
// All return a cudaError_t.
template <typename S>
struct HeadCuda {
  using A = Statistic<S>;
  static int workspace_bytes(const HeadInput<S, A>& in, bool backward, int64_t* bytes);
  static int forward(const HeadInput<S, A>& in, const HeadOutput<A>& out, void* workspace, void* stream);
  static int backward(
      const HeadInput<S, A>& in, const HeadOutput<const A>& saved, const HeadGrad<A>& grad,
      const HeadInputGrad<S, A>& out, void* workspace, void* stream);
};

}  // namespace dan_fast

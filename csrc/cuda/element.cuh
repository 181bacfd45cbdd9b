// CUDA's own types for what common/scalar.h stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/scalar.h"

namespace dan_fast {

template <typename S>
struct ElementOf {
  using type = S;
};
template <>
struct ElementOf<BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct ElementOf<Float16> {
  using type = __half;
};

// Of the size and bits of S.
template <typename S>
using Element = typename ElementOf<S>::type;

}  // namespace dan_fast

// torch.ops.dan_fast.augment_images and normalize_images: checks and output tensors. csrc/images/augment.h says what is
// computed. On the CPU only: on a GPU, PyTorch's operators do the same.
#include "../csrc/images/augment.h"

#include "dispatch.h"
#include "reused_blocks.h"

namespace {

using namespace dan_fast;

struct ImageArguments {
  ImageArguments(const Tensor& images_, const Tensor& mean_, const Tensor& std_) {
    STD_TORCH_CHECK(images_.dim() == 4 && images_.size(1) == 3, "images must be (n, 3, H, W)");
    count = images_.size(0);
    height = images_.size(2);
    width = images_.size(3);
    images = argument("images", images_, "(n, 3, H, W)", {count, 3, height, width}, ScalarType::Byte, images_);
    mean = argument("mean", mean_, "(3,)", {3}, ScalarType::Float, images);
    std = argument("std", std_, "(3,)", {3}, ScalarType::Float, images);
    out = reused_images(images, count, 3, height, width);
  }

  static Tensor argument(
      const char* name, const Tensor& tensor, const char* shape, Sizes sizes, ScalarType dtype, const Tensor& like) {
    return checked(name, tensor, shape, sizes, dtype, like, "images");
  }

  Images pointers() const {
    return {count, height, width, data<const uint8_t>(images), data<const float>(mean), data<const float>(std),
            data<float>(out)};
  }

  int64_t count, height, width;
  Tensor images, mean, std, out;
};

Tensor augment_images_cpu(
    const Tensor& images, const Tensor& flip_, const Tensor& top_, const Tensor& left_, const Tensor& order_,
    const Tensor& factors_, int64_t border, const Tensor& mean, const Tensor& std) {
  const ImageArguments args(images, mean, std);
  const int64_t n = args.count;
  const Tensor flip = args.argument("flip", flip_, "(n,)", {n}, ScalarType::Bool, args.images);
  const Tensor top = args.argument("top", top_, "(n,)", {n}, ScalarType::Long, args.images);
  const Tensor left = args.argument("left", left_, "(n,)", {n}, ScalarType::Long, args.images);
  const Tensor order = args.argument("order", order_, "(n, 3)", {n, 3}, ScalarType::Long, args.images);
  const Tensor factors = args.argument("factors", factors_, "(n, 3)", {n, 3}, ScalarType::Float, args.images);
  const ImageDraws draws{border, data<const uint8_t>(flip), data<const int64_t>(top), data<const int64_t>(left),
                         data<const int64_t>(order), data<const float>(factors)};
  for (int64_t i = 0; i < n * kChanges; ++i) {
    STD_TORCH_CHECK(
        draws.order[i] >= 0 && draws.order[i] < kChanges, "order holds ", draws.order[i], ", not 0, 1 or 2");
  }
  const Images in = args.pointers();
  const auto kernel = DAN_FAST_KERNEL(augment_images);
  torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) { kernel(in, draws, first, last); });
  return args.out;
}

Tensor normalize_images_cpu(const Tensor& images, const Tensor& mean, const Tensor& std) {
  const ImageArguments args(images, mean, std);
  const Images in = args.pointers();
  const auto kernel = DAN_FAST_KERNEL(normalize_images);
  torch::stable::parallel_for(0, args.count, 1, [&](int64_t first, int64_t last) { kernel(in, first, last); });
  return args.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) {
  m.def(
      "augment_images(Tensor images, Tensor flip, Tensor top, Tensor left, Tensor order, Tensor factors, int border, "
      "Tensor mean, Tensor std) -> Tensor");
  m.def("normalize_images(Tensor images, Tensor mean, Tensor std) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("augment_images", TORCH_BOX(&augment_images_cpu));
  m.impl("normalize_images", TORCH_BOX(&normalize_images_cpu));
}

#include "cuda/kernels.h"

namespace kvcomp::cuda {

bool driver_suffices() {
  int version = 0;  // stays so where there is no driver
  return cudaDriverGetVersion(&version) != cudaSuccess || version == 0 ||
         version / 1000 >= CUDART_VERSION / 1000;
}

}  // namespace kvcomp::cuda

// The tests' module: the ops, with their CUDA code under the emulator.
#include <pybind11/pybind11.h>

#include "ops/register.h"
#include "tensor.h"

PYBIND11_MODULE(_emulated, m, pybind11::mod_gil_not_used()) {
  kvcomp::load_torch();
  kvcomp::add_natives(m);
}

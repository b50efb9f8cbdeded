// What the probes share: see cuda_host_probes.cpp.
#pragma once

#include <map>
#include <stdexcept>
#include <string>

#include "emulator/cuda.h"

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::logic_error(std::string("probe failed: ") + what);
}
#define EXPECT(condition) expect(condition, #condition)

inline constexpr kvcomp::emulator::Launch launch{"probe"};

using Probes = std::map<std::string, void (*)()>;  // by name
extern const Probes global_memory_probes;

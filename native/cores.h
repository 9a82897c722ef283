// Which processors this process may use, and how much of them.
#pragma once

#include <string>
#include <vector>

namespace headrace {

// Numbers of the processors in the calling thread's affinity mask, ascending; empty where the system does not tell.
std::vector<int> allowed_cpus();

// Cores' worth of CPU time that the control groups of this process grant, v1 and v2, the tightest of the group and
// those around it; 0 without a limit. `root` stands before /proc and /sys.
double cpu_quota(const std::string& root = "");

// Cores that this process may use: its affinity mask, capped by its quota (rounded up). At least 1.
int available_cores(const std::string& root = "");

// While it lives, keeps the calling thread on the first allowed processor: with a pool that has one thread for each
// core, beside the others and never on top of one of them. For measurements; elsewhere the caller's thread is its own.
class FirstCpu {
 public:
  FirstCpu();
  ~FirstCpu();
  FirstCpu(const FirstCpu&) = delete;
  FirstCpu& operator=(const FirstCpu&) = delete;

 private:
  std::vector<int> before_;
};

}  // namespace headrace

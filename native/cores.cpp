#include "cores.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <thread>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace headrace {
namespace {

#ifdef __linux__
void stay_on(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}
#endif

// A small file's text, if it is there. Not by way of a stream: those ask the locale how numbers look, and where a
// second copy of libstdc++ is in the process (linked in statically, or another package's) the two may mix their locales
// up and crash.
std::optional<std::string> text_of(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "r"), &std::fclose);
  if (!file) return std::nullopt;
  std::string text;
  char part[1024];
  while (const size_t length = std::fread(part, 1, sizeof part, file.get())) text.append(part, length);
  return text;
}

// The path of this process's group in the v2 hierarchy (`controller` empty) or in that of a v1 controller: lines of
// /proc/self/cgroup are "number:controllers:path".
std::string group_path(const std::string& root, const std::string& controller) {
  const std::string text = text_of(root + "/proc/self/cgroup").value_or("");
  for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controllers == ",," ? controller.empty() : controllers.find("," + controller + ",") != std::string::npos) {
      return line.substr(second + 1);
    }
  }
  return "/";
}

// Cores' worth that one group grants; 0 if it sets no limit or is not there.
double quota_of(const std::string& group) {
  long long quota = 0, period = 0;
  if (const auto v2 = text_of(group + "/cpu.max")) {
    if (std::sscanf(v2->c_str(), "%lld %lld", &quota, &period) != 2) return 0;  // "max 100000"
  } else {
    const auto v1 = [&](const char* name) { return text_of(group + name).value_or(""); };
    if (std::sscanf(v1("/cpu.cfs_quota_us").c_str(), "%lld", &quota) != 1) return 0;
    if (std::sscanf(v1("/cpu.cfs_period_us").c_str(), "%lld", &period) != 1) return 0;
  }
  return quota > 0 && period > 0 ? static_cast<double>(quota) / static_cast<double>(period) : 0;  // v1's -1: no limit
}

}  // namespace

double cpu_quota(const std::string& root) {
  double least = 0;
  const auto consider = [&](const std::string& mount, std::string path) {
    // From the group outwards. Inside a container the path may be the host's, which the mount does not show: groups
    // that are not there set no limit, and the mount itself is the container's.
    for (;; path.resize(path.rfind('/'))) {
      if (const double quota = quota_of(mount + path); quota > 0) least = least > 0 ? std::min(least, quota) : quota;
      if (path.rfind('/') == std::string::npos) return;
    }
  };
  const std::string mounts = root + "/sys/fs/cgroup";
  consider(mounts, group_path(root, ""));
  for (const char* name : {"/cpu", "/cpu,cpuacct"}) consider(mounts + name, group_path(root, "cpu"));
  return least;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
#endif
  return cpus;
}

int available_cores(const std::string& root) {
  int cores = std::max(1u, std::thread::hardware_concurrency());
  if (const auto cpus = allowed_cpus(); !cpus.empty()) cores = static_cast<int>(cpus.size());
  if (const double quota = cpu_quota(root); quota > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota)));
  return cores;
}

FirstCpu::FirstCpu() : before_(allowed_cpus()) {
#ifdef __linux__
  if (!before_.empty()) stay_on({before_.front()});
#endif
}

FirstCpu::~FirstCpu() {
#ifdef __linux__
  if (!before_.empty()) stay_on(before_);
#endif
}

}  // namespace headrace

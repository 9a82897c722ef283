// Other values of all of a runtime's parameters, packed beside running steps and exchanged between two of them.
#pragma once

#include <memory>
#include <vector>

#include "runtime.h"

namespace headrace {

// Formats and shapes are those that the runtime has, so plans go on as they are. Setting touches nothing that steps
// read: any thread may do it, several for different parameters.
class StagedWeights {
 public:
  explicit StagedWeights(const Runtime& runtime);  // throws std::bad_alloc
  StagedWeights(const StagedWeights&) = delete;
  StagedWeights& operator=(const StagedWeights&) = delete;

  // Throw std::invalid_argument if the weight is not of the format and shape that linear, table or vector `i` has. A
  // linear's bytes are packed at once; a table's must stay valid.
  void set_linear(int i, const WeightView& weight, int64_t interleaved_heads);
  void set_table(int i, const Table& table);
  void set_vector(int i, const float* data, int64_t size);

  // Let the runtime run with these, and keep those it had. Throws std::invalid_argument, and nothing changes, if a
  // parameter was not set or a step is running.
  void exchange(Runtime& runtime);

 private:
  std::vector<std::unique_ptr<Linear>> packers_;
  std::vector<uint8_t*> places_;
  std::vector<std::shared_ptr<const Pages>> packed_;
  std::vector<Table> tables_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Format> formats_;
  std::vector<char> is_set_;  // linears, then tables, then vectors; char: written by several threads
};

}  // namespace headrace

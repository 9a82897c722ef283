#include "staged_weights.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace headrace {
namespace {

[[noreturn]] void refuse(const char* kind, int i, const std::string& why) {
  throw std::invalid_argument(std::string(kind) + " " + std::to_string(i) + " " + why);
}

std::string shape_text(int64_t rows, int64_t features) {
  return std::to_string(rows) + " x " + std::to_string(features);
}

}  // namespace

StagedWeights::StagedWeights(const Runtime& runtime)
    : tables_(runtime.tables_.begin(), runtime.tables_.end()), vectors_(runtime.vectors_), formats_(runtime.formats_) {
  size_t bytes = 0;
  for (const auto& linear : runtime.linears_) bytes += packed_room(*linear);
  uint8_t* at = packed_.emplace_back(std::make_shared<Pages>(bytes))->data();
  for (size_t i = 0; i < runtime.linears_.size(); ++i) {
    const Linear& linear = *runtime.linears_[i];
    packers_.push_back(
        make_linear(formats_[i], linear.out_features, linear.in_features, runtime.isa, runtime.activation));
    packers_.back()->place(at);
    places_.push_back(at);
    at += packed_room(linear);
  }
  is_set_.resize(packers_.size() + tables_.size() + vectors_.size());
}

void StagedWeights::set_linear(int i, const WeightView& weight, int64_t interleaved_heads) {
  Linear& packer = *packers_.at(i);
  if (weight.format != formats_[i] || weight.out_features != packer.out_features ||
      weight.in_features != packer.in_features) {
    refuse("linear", i,
           "is " + shape_text(packer.out_features, packer.in_features) + " in its format, not " +
               shape_text(weight.out_features, weight.in_features) + " in another");
  }
  const int64_t step = std::max<int64_t>(1, 256 / packer.column_tile) * packer.column_tile;
  for (int64_t begin = 0; begin < packer.out_features; begin += step) {
    pack_columns(packer, weight, interleaved_heads, begin, std::min(begin + step, packer.out_features));
  }
  is_set_[i] = true;
}

void StagedWeights::set_table(int i, const Table& table) {
  Table& own = tables_.at(i);
  if (table.format != own.format || table.rows != own.rows || table.features != own.features) {
    refuse("table", i, "is " + shape_text(own.rows, own.features) + " in its format");
  }
  own = table;
  is_set_[packers_.size() + i] = true;
}

void StagedWeights::set_vector(int i, const float* data, int64_t size) {
  std::vector<float>& own = vectors_.at(i);
  if (static_cast<size_t>(size) != own.size()) refuse("vector", i, "has " + std::to_string(own.size()) + " values");
  std::copy(data, data + size, own.begin());
  is_set_[packers_.size() + tables_.size() + i] = true;
}

void StagedWeights::exchange(Runtime& runtime) {
  const Runtime::Claim claim(runtime);
  if (std::find(is_set_.begin(), is_set_.end(), false) != is_set_.end()) {
    throw std::invalid_argument("some parameters have no staged weights");
  }
  for (size_t i = 0; i < places_.size(); ++i) {
    runtime.linears_[i]->place(places_[i]);
    std::swap(places_[i], runtime.places_[i]);
  }
  std::swap(packed_, runtime.packed_);
  std::swap_ranges(tables_.begin(), tables_.end(), runtime.tables_.begin());
  for (size_t i = 0; i < vectors_.size(); ++i) {  // plans know where the values lie
    std::swap_ranges(vectors_[i].begin(), vectors_[i].end(), runtime.vectors_[i].begin());
  }
}

}  // namespace headrace

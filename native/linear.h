// Linear layers over packed weights: y = x * W^T, f32 in, f32 out.
//
// Contract (determinism): y[m][n] depends only on row m of x, row n of W, the instruction set and the activation
// precision. It does not depend on the number of rows, on the other rows, on the column range of a call, or on threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace headrace {

enum class Isa : uint8_t { portable, avx2, avx512, avx512_vnni, amx };

// Number formats as checkpoints hold them: plain rows for f32, f16, bf16; GGUF block layouts; from `row_blocks` on, the
// members of the family of headrace.numerics.row_blocks that were asked for by name (`format_named`).
enum class Format : uint16_t { f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, row_blocks };

// Precision in which a linear reads its activations.
//   f32    exactly, or as two bf16 halves, which keep 2^-17 of each value (amx)
//   int16  fixed point of 16 bits, of the largest magnitude in each scale group of a quantized weight, or of each row
//          (amx); read as f32 by plain weights, and by row blocks of e4m3 or in groups of 16
//   bf16   rounded to bf16
//   int8   like int16, of 8 bits; amx: as int16, and quantized weights are rounded to 8 bits of each row's largest
enum class Activation : uint8_t { f32, int16, bf16, int8 };

const char* activation_name(Activation activation);

// The precision of that name; "auto": the fastest on `isa` of those that keep 16 bits or more. Throws
// std::invalid_argument, listing what there is, for another name.
Activation choose_activation(const std::string& name, Isa isa);

constexpr bool is_fixed_point(Activation a) { return a == Activation::int16 || a == Activation::int8; }

// A weight [out, in] as stored: rows of `row_bytes` bytes in `format`. Borrowed; must outlive `pack` only.
struct WeightView {
  Format format;
  const uint8_t* data;
  int64_t out_features;
  int64_t in_features;
  int64_t row_bytes;
};

// What a kernel wants its input converted to. Linears with equal forms that read the same activation share one
// conversion.
struct InputForm {
  Isa isa;
  Activation activation;
  int32_t group;   // features that the kernel converts or sums together; 0: none
  int32_t layout;  // private to the kernels
  bool operator==(const InputForm&) const = default;
};

size_t prepared_bytes(const InputForm& form, int64_t rows, int64_t features);

// Convert rows [row_begin, row_end) of x. Ranges are independent: any may be converted at once.
void prepare(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features, void* prepared,
             int64_t row_begin, int64_t row_end);

constexpr size_t kPackedAlignment = 64;

class Linear {
 public:
  virtual ~Linear();
  int64_t out_features = 0;
  int64_t in_features = 0;
  InputForm form{};
  const char* kernel = "";   // name for logs: "amx w4 g32", "vnni w4a16 g32", ...
  size_t packed_bytes = 0;   // of the packed form
  int64_t column_tile = 16;  // column ranges start at multiples of this

  // Where the packed form lives: `packed_bytes` aligned to kPackedAlignment, the caller's to keep. Before `pack`.
  virtual void place(uint8_t* memory) = 0;
  // y[m][n] for all rows m and columns n in [column_begin, column_end); y points at column 0 of the output.
  // Thread-safe: disjoint column ranges may run concurrently. Allocates nothing.
  virtual void run(const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
                   int64_t column_end) const = 0;
  // Fill the packed form of columns [column_begin, column_end) (multiples of column_tile): callable in parallel.
  virtual void pack(const WeightView& weight, int64_t column_begin, int64_t column_end) = 0;
};

// Choose a kernel for this shape and format; `place`, then `pack`, make it usable. Throws std::invalid_argument, naming
// the cause, for a format or shape that no kernel takes (e.g. in_features not a multiple of the format's block).
std::unique_ptr<Linear> make_linear(Format format, int64_t out_features, int64_t in_features, Isa isa,
                                    Activation activation);

// Decode `features` values of one stored row (embedding look-up; reference for the kernels).
void decode_row(Format format, const uint8_t* row, int64_t features, float* out);

// Instruction sets that both this build and this machine have, best last.
bool isa_available(Isa isa);

}  // namespace headrace

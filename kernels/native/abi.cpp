// What native_library.py compares with its own version of the interface when it loads the library.
#include "native.h"

BELLE_API int belle_abi() { return belle::kAbi; }

// Return the size in bytes of a struct of native.h by its index in `native_structs.STRUCTS`, or -1 after the last one.
BELLE_API int64_t belle_struct_size(int index) {
  constexpr int64_t kSizes[] = {
      sizeof(WeightStruct), sizeof(PackedWordsStruct), sizeof(CodeRowsStruct), sizeof(RowQuantizationStruct),
      sizeof(NewTokensStruct), sizeof(KvCacheStruct), sizeof(DecodeStepStruct), sizeof(AttentionStruct),
      sizeof(CallStruct), sizeof(GptqBlockStruct), sizeof(CoordinateDescentStruct), sizeof(GridSearchStruct)};
  constexpr int kCount = sizeof kSizes / sizeof kSizes[0];
  return index >= 0 && index < kCount ? kSizes[index] : -1;
}

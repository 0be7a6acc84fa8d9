// SPDX-License-Identifier: Apache-2.0
// The part of DLPack's C exchange API that reads a tensor without a Python call: the memory layout
// of DLPack 1.3, https://dmlc.github.io/dlpack/latest/c_api.html, under which torch publishes it as
// `torch.Tensor.__dlpack_c_exchange_api__`. Minor versions only append, so any 1.x will do.
#pragma once

#include <cstdint>

namespace latte::python::dlpack {

inline constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
inline constexpr const char* kCapsule = "dlpack_exchange_api";
inline constexpr uint32_t kMajorVersion = 1;
inline constexpr int32_t kCpu = 1, kCuda = 2;

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

// DLTensor, with the DLDevice and DLDataType it contains.
struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t rank;
  uint8_t type_code;
  uint8_t bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48);

// DLPackExchangeAPI. The functions that are not called here are untyped.
struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  // 0, or -1 with a Python exception set. The view lives as long as the tensor is not touched.
  int (*dltensor_from_py_object_no_sync)(void* object, Tensor* out);
  void (*current_work_stream)();
};

}  // namespace latte::python::dlpack

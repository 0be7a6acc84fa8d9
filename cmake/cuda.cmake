# SPDX-License-Identifier: Apache-2.0
# The CUDA kernels in the library: what is built, for which devices.
set(LATTE_CUDA OFF CACHE STRING 
  "Build the CUDA kernels: ON, OFF, AUTO: where nvcc works, or EMULATED: on the CPU, for tests")
set_property(CACHE LATTE_CUDA PROPERTY STRINGS AUTO ON OFF EMULATED)
# Code for the devices of today, and PTX of the last for those to come.
set(LATTE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120)

set(latte_cuda ${LATTE_CUDA})
if(LATTE_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  set(latte_cuda ${CMAKE_CUDA_COMPILER})
endif()

if(NOT latte_cuda)
  target_sources(latte PRIVATE cuda/no_cuda.cpp)
  return()
endif()

if(LATTE_CUDA STREQUAL "EMULATED")
  include(cmake/cuda_emulation.cmake)
  latte_add_emulation(latte_emulation "${LATTE_SANITIZE}")
  add_library(latte_cuda OBJECT ${cuda_sources} cuda/emulated.cpp)
  target_include_directories(latte_cuda PRIVATE
    . cpp/src cpp/include ${CMAKE_CURRENT_BINARY_DIR}/include)
  target_compile_definitions(latte_cuda PRIVATE latte_EXPORTS)
  target_compile_options(latte_cuda PRIVATE ${kernel_options})
  target_link_libraries(latte_cuda PRIVATE latte_emulation)
  target_sources(latte PRIVATE $<TARGET_OBJECTS:latte_cuda> $<TARGET_OBJECTS:latte_emulation>)
  target_link_libraries(latte PRIVATE Threads::Threads)
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${LATTE_CUDA_ARCHITECTURES})
endif()
# Static: a wheel then needs a driver to run kernels, and nothing at all to be imported.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
# CMake before 3.25.2 does not know that nvcc has C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()

# Kernels are objects of their own, so that their options do not reach the CPU backend.
file(GLOB kernels CONFIGURE_DEPENDS cuda/*.cu)
add_library(latte_cuda OBJECT ${kernels} cuda/devices.cpp)
target_include_directories(latte_cuda PRIVATE
  . cpp/src cpp/include ${CMAKE_CURRENT_BINARY_DIR}/include)
string(REPLACE ";" " " architectures "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_definitions(latte_cuda PRIVATE
  latte_EXPORTS LATTE_CUDA_ARCHITECTURES="${architectures}")
# --expt-relaxed-constexpr: kernels call the constexpr functions of heuristics.h, plain C++.
# -ftz: without it every exp, division and comparison guards subnormals: a fifth of all
# instructions of the causal kernel.
target_compile_options(latte_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -ftz=true -lineinfo -Werror=all-warnings -Xcompiler=-Wall,-Wextra>)
set_target_properties(latte_cuda PROPERTIES
  CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
target_sources(latte PRIVATE $<TARGET_OBJECTS:latte_cuda>)
find_package(CUDAToolkit REQUIRED)
target_link_libraries(latte_cuda PRIVATE CUDA::cudart_static)
target_link_libraries(latte PRIVATE CUDA::cudart_static)

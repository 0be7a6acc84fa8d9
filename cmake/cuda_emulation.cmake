# SPDX-License-Identifier: Apache-2.0
# The CUDA kernels as C++ on the emulation of cuda/emulation: for tests/cuda, and for LATTE_CUDA
# EMULATED. Included by the directory that compiles them.
set(cuda_dir ${PROJECT_SOURCE_DIR}/cuda)
find_package(Threads REQUIRED)
file(GLOB emulation_sources CONFIGURE_DEPENDS ${cuda_dir}/emulation/*.cpp)
file(GLOB cuda_sources CONFIGURE_DEPENDS ${cuda_dir}/*.cu)
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")

# latte_add_emulation(<target> <sanitizers> <flags>...): the runtime. TSan must not instrument it:
# what orders the threads of a kernel is the kernel's barriers, not the scheduler that runs them.
function(latte_add_emulation target sanitizers)
  add_library(${target} OBJECT ${emulation_sources})
  target_include_directories(${target} PUBLIC
    ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/cpp/include ${PROJECT_BINARY_DIR}/include)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_compile_options(${target} PRIVATE -Wall -Wextra -O2 ${ARGN})
  target_link_libraries(${target} PUBLIC Threads::Threads)
  if(sanitizers MATCHES thread)
    # A loop turned into memset would be a call that TSan intercepts.
    target_compile_options(${target} PRIVATE
      -fno-sanitize=thread -fno-tree-loop-distribute-patterns)
    target_compile_definitions(${target} PRIVATE LATTE_EMULATION_TSAN)
  elseif(sanitizers MATCHES address)
    target_compile_definitions(${target} PRIVATE LATTE_EMULATION_ASAN)
  endif()
endfunction()

# Options of code that holds kernels.
set(kernel_options -Wall -Wextra -Wno-unknown-pragmas)
if(LATTE_SANITIZE)
  list(APPEND kernel_options -O1)
else()
  list(APPEND kernel_options -O2)
endif()

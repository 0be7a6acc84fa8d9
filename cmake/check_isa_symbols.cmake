# SPDX-License-Identifier: Apache-2.0
# cmake -DNM=<nm> -DNAMESPACE=<isa_v3> "-DOBJECTS=<objects>" -P check_isa_symbols.cmake
#
# Fails when an object compiled for one instruction set defines a function that other objects may
# define too: the linker keeps one copy for all, and it could be the one that this machine cannot
# run. Global and weak functions (T, W, i in nm's letters) must be in the object's own namespace.
if(NOT OBJECTS)
  message(FATAL_ERROR "no object to check")
endif()
string(LENGTH "${NAMESPACE}" length)
# _ZN..., _ZNK... (const), _ZZN... (local to a function)
set(own "^_ZZ*N[VKRO]*5latte${length}${NAMESPACE}")
set(shared "")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only --no-sort ${object}
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [TWi] [^\n]+" functions "${symbols}")
  if(NOT functions MATCHES "5latte${length}${NAMESPACE}(5tableEv|10run_windowE|8run_stepE)")
    message(FATAL_ERROR
      "${object} has none of table(), run_window() and run_step() of latte::${NAMESPACE}")
  endif()
  foreach(function IN LISTS functions)
    string(REGEX REPLACE "^[0-9a-f]+ [TWi] " "" name "${function}")
    if(NOT name MATCHES "${own}")
      string(APPEND shared "\n  ${name}")
    endif()
  endforeach()
endforeach()
if(shared)
  message(FATAL_ERROR "functions outside latte::${NAMESPACE}, which the linker may share:${shared}")
endif()

# operations.h, which includes every header of ops/, for programs that call any operation (replay.h).
function(operations_header target)
  get_filename_component(repo ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../.. ABSOLUTE)
  file(GLOB headers RELATIVE ${repo} CONFIGURE_DEPENDS ${repo}/ops/*.h)
  list(TRANSFORM headers REPLACE "(.+)" "#include \"\\1\"\n")
  string(JOIN "" headers ${headers})
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/operations/operations.h
    CONTENT "#pragma once\n${headers}")
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/operations)
endfunction()

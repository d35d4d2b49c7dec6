# Runs the probe and compares what it prints with the golden list.
execute_process(COMMAND ${PROBE} OUTPUT_VARIABLE printed RESULT_VARIABLE status)
file(READ ${GOLDEN} golden)
if(NOT status EQUAL 0 OR NOT printed STREQUAL golden)
  message(FATAL_ERROR "The probe printed:\n${printed}\ninstead of ${GOLDEN}")
endif()

#include <iostream>

#include "src/cli/cli.hpp"

int main(int argc, char** argv) { return hqq::cli::run(argc, argv, std::cout, std::cerr); }

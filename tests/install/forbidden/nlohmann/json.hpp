#error "a public header of hqq includes nlohmann/json"

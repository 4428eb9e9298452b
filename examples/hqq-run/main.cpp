// hqq-run: text, perplexity, logits and importance of a checkpoint folder (README.md).
#include <CLI/CLI.hpp>
#include <chrono>
#include <iostream>

#include "evaluate.hpp"
#include "sampler.hpp"
#include "tokenizer.hpp"

namespace {

struct Options {
  std::filesystem::path folder, logits, perplexity, importance, tokenize;
  std::string prompt, mode = "auto";
  std::int64_t tokens = 128, random_tokens = 0, window = 512, windows = 1 << 24;
  float temperature = 0, top_p = 1;
  std::uint64_t seed = 0;
  bool ignore_eos = false;
  int threads = 0, lm_head_bits = -1;
};

// CLI::Range lets nan pass.
CLI::Validator between(double least, double most) {
  const auto check = [=](const std::string& text) {
    double number = 0;
    const bool valid = CLI::detail::lexical_cast(text, number) && number >= least && number <= most;
    return valid ? ""
                 : text + " is not a number from " + std::to_string(least) + " to " +
                       std::to_string(most);
  };
  return CLI::Validator(check, "NUMBER");
}

void add_options(CLI::App& app, Options& o) {
  const CLI::Range count(0, 1 << 24);
  app.add_option("FOLDER", o.folder, "Checkpoint folder, quantized or float")->required();
  app.add_option("--prompt", o.prompt, "Text to go on from");
  app.add_option("--tokens", o.tokens, "Most tokens to generate")->check(count);
  app.add_option("--temperature", o.temperature, "0: always the most likely token")
      ->check(between(0, 100));
  app.add_option("--top-p", o.top_p, "Only the most likely tokens, which add up to this")
      ->check(between(0, 1));
  app.add_option("--seed", o.seed, "Of everything random")->check(CLI::NonNegativeNumber);
  app.add_flag("--ignore-eos", o.ignore_eos, "Go on after the end of the text");
  app.add_option("--mode", o.mode, "Products: fast, exact, or auto (HQQ_CPU_MODE, else fast)");
  app.add_option("--threads", o.threads, "0: HQQ_NUM_THREADS, else all processors")
      ->check(CLI::Range(0, std::max(256, hqq::default_threads())));
  app.add_option("--lm-head-bits", o.lm_head_bits,
                 "Quantize a float lm_head when loading; 0: do not (default: 8, float folders 0)")
      ->check(CLI::IsMember({0, 1, 2, 3, 4, 5, 6, 8}));
  CLI::Option_group& instead = *app.add_option_group("Instead of text");
  instead.require_option(0, 1);
  instead.add_option("--tokenize", o.tokenize, "Print the tokens of a text file");
  instead.add_option("--logits", o.logits, "Write logits [tokens, vocabulary] (safetensors)");
  instead.add_option("--perplexity", o.perplexity, "Print the perplexity of a text file");
  instead.add_option("--importance", o.importance,
                     "Write the mean square of every linear layer's input over the prompt or "
                     "--random-tokens (safetensors)");
  app.add_option("--random-tokens", o.random_tokens, "Instead of a prompt")->check(count);
  app.add_option("--window", o.window, "For --perplexity: tokens")->check(CLI::Range(2, 1 << 24));
  app.add_option("--windows", o.windows, "For --perplexity: at most so many")->check(count);
}

// Text goes to standard output as it comes, speeds to standard error.
void generate(const Model& model, const Tokenizer& tokenizer, const Tokens& prompt,
              std::mt19937_64& random, const Options& o) {
  using Clock = std::chrono::steady_clock;
  const std::int64_t needed = std::ssize(prompt) + std::max<std::int64_t>(o.tokens - 1, 0);
  if (needed > model.config().max_position_embeddings) {
    hqq::throw_invalid("tokens", "a prompt of " + std::to_string(prompt.size()) +
                                     " tokens and --tokens " + std::to_string(o.tokens) +
                                     " are more than the model's " +
                                     std::to_string(model.config().max_position_embeddings) +
                                     " positions (max_position_embeddings)");
  }
  Context context;
  const auto next_token = [&](const Tokens& tokens) {
    const Matrix logits = model.logits(model.forward(tokens, context).bottomRows(1));
    return sample({logits.data(), logits.data() + logits.size()}, o.temperature, o.top_p, random);
  };
  const auto report = [](const char* what, std::int64_t tokens, Clock::duration time) {
    const double speed = tokens / std::chrono::duration<double>(time).count();
    std::cerr << what << ": " << tokens << " tokens, " << speed << " tokens/s\n";
  };
  const Clock::time_point start = Clock::now();
  std::int64_t token = next_token(prompt), generated = 0;
  const Clock::time_point middle = Clock::now();
  while (generated < o.tokens && (o.ignore_eos || !model.config().eos_token_ids.contains(token))) {
    std::cout << tokenizer.decode(token) << std::flush;
    if (++generated < o.tokens) token = next_token({token});
  }
  std::cout << std::endl;
  report("prompt", std::ssize(prompt), middle - start);
  generated = std::max<std::int64_t>(generated - 1, 0);  // the first came with the prompt
  report("text", generated, Clock::now() - middle);
}

void run(const Options& o) {
  const Tokenizer tokenizer(o.folder / "tokenizer.json");
  const std::filesystem::path file = o.tokenize.empty() ? o.perplexity : o.tokenize;
  Tokens tokens = tokenizer.encode(file.empty() ? o.prompt : read_text(file, 1 << 28));
  if (!o.tokenize.empty()) {
    for (const std::int64_t token : tokens) std::cout << token << '\n';
    return;
  }
  const int threads = o.threads > 0 ? o.threads : hqq::default_threads();
  Model model(o.folder, {hqq::linear_mode_from_string(o.mode), threads}, o.lm_head_bits);
  std::mt19937_64 random(o.seed);
  if (o.random_tokens > 0) tokens.resize(o.random_tokens);
  for (std::int64_t i = 0; i < o.random_tokens; ++i)
    tokens[i] = random() % model.config().vocab_size;
  if (tokens.empty()) hqq::throw_invalid("prompt", "there are no tokens; give --prompt TEXT");

  if (!o.perplexity.empty()) {
    std::cout << perplexity(model, tokens, o.window, o.windows) << std::endl;
  } else if (!o.importance.empty()) {
    const std::map<std::string, hqq::Tensor> values = importance(model, tokens);
    std::vector<std::pair<std::string, const hqq::Tensor*>> tensors;
    for (const auto& [layer, tensor] : values) tensors.emplace_back(layer, &tensor);
    hqq::save_safetensors(o.importance, tensors, {{"hqq_cpp.kind", "importance"}});
  } else if (!o.logits.empty()) {
    Context context;
    const Matrix logits = model.logits(model.forward(tokens, context));
    hqq::Tensor tensor = hqq::Tensor::allocate(hqq::DType::kF32, {logits.rows(), logits.cols()});
    std::copy_n(logits.data(), logits.size(), tensor.data<float>());
    hqq::save_safetensors(o.logits, {{"logits", &tensor}});
  } else {
    generate(model, tokenizer, tokens, random, o);
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Run a Llama or Qwen3 checkpoint folder, quantized by hqq-cpp or float.", "hqq-run");
  Options options;
  add_options(app, options);
  try {
    app.parse(argc, argv);
    run(options);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const std::bad_alloc&) {
    std::cerr << "hqq-run: the weights and " << options.random_tokens
              << " random tokens, or the text, do not fit into memory" << std::endl;
  } catch (const std::exception& error) {
    std::cerr << "hqq-run: " << error.what() << std::endl;
  }
  return 2;
}

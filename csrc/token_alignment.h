// Edit distances between tokens as bytes: the nearest token of another vocabulary, and the time
// warping between two tokenizations of one text. See token_alignment.cpp for how.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace cot2align {

class TokenIndex {
 public:
  explicit TokenIndex(std::vector<std::string> tokens);

  // The position of the token with the least edit distance to each query, of several the first; -1
  // where there are no tokens.
  std::vector<int64_t> nearest(const std::vector<std::string>& queries, int num_threads) const;

 private:
  struct Entry {
    uint64_t characters;  // a bit for each byte that occurs, modulo 64
    int64_t position;
  };
  int64_t nearest_one(const std::string& query) const;

  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int64_t> positions_;
  std::vector<std::vector<Entry>> by_length_;
};

// Dynamic time warping with the edit distance as cost; of equally cheap steps the diagonal goes
// first, then the one along x. For each token of x the only token of y that it is matched with, or
// -1 where there are several.
std::vector<int64_t> align_tokens(const std::vector<std::string>& x,
                                  const std::vector<std::string>& y);

}  // namespace cot2align

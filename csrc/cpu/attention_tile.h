// A tile of the CPU attention: the rows of K and V that it reads, and how a tensor's layout decides
// which heads are read together and how many tokens a tile has.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace kvcomp::cpu {

using simd::kTile;

// What the layout of K and V in memory asks for.
struct Layout {
  int heads_together;  // KV heads: where memory holds those of one token together, all of them
  bool scattered;      // whether a head's rows lie about in pieces under 2 KiB
  bool coded;          // K and V are codes
  int tile_size;       // tokens
  int span_size;       // tokens, a multiple of tile_size

  explicit Layout(const DecodeAttentionParams& p)
      : heads_together(p.stride_k_h < p.stride_k_t && p.num_kv_heads > 1 ? p.num_kv_heads : 1),
        scattered(
            p.stride_k_t != p.head_dim ||
            (p.page_ids && std::int64_t{p.page_size} * p.head_dim * size_of(p.kv_dtype) < 2048)),
        coded(p.kv_dtype == ScalarType::i8),
        tile_size(std::clamp(elements() / p.head_dim / 16 * 16, 16, kTile)),
        span_size((heads_together > 1 ? 256 : 512) / tile_size * tile_size) {}

 private:
  // Of a head that make a tile: several heads of a token are many bytes as it is, and codes few.
  int elements() const {
    return (heads_together > 1 ? 2048 : scattered ? 8192 : 4096) * (coded ? 2 : 1);
  }
};

// A tile's rows of one KV head.
struct TileRows {
  int count;  // tokens attended; holes are left out
  int position[kTile];
  const void *k[kTile], *v[kTile];
  // Words of codes, in pieces: asked for with the rows, and read when the tile is in work.
  struct Piece {
    const std::uint32_t* words;
    int length;
  };
  Piece pieces[kTile];
  int num_pieces;

  // Tokens [first, end) of a sequence; end - first <= tile_size.
  void gather(const DecodeAttentionParams& p, int batch, int head, int first, int end,
              int tile_size) {
    const Bases bases(p, batch, head);
    count = num_pieces = 0;
    const bool pages = p.page_ids && p.page_size > 1;
    for_each_piece(p, batch, head, first, end, [&](int token, std::int64_t slot, int length) {
      if (pages) {
        touch(bases.k + slot * bases.step_k, (length - 1) * bases.step_k);
        touch(bases.v + slot * bases.step_v, (length - 1) * bases.step_v);
      }
      const char *next_k = bases.k + slot * bases.step_k, *next_v = bases.v + slot * bases.step_v;
      const int begin = count;  // and pointers in registers: lists are written, nothing is read
      for (int i = 0; i < length; ++i, next_k += bases.step_k, next_v += bases.step_v) {
        position[begin + i] = token + i;
        k[begin + i] = next_k;
        v[begin + i] = next_v;
      }
      if (bases.words) {
        touch(bases.words + slot);
        pieces[num_pieces++] = {bases.words + slot, length};
      }
      count = begin + length;
    });
    for (int i = count; i < tile_size; ++i) {  // full lists, as rows.h wants them
      k[i] = count ? k[count - 1] : bases.k;
      v[i] = count ? v[count - 1] : bases.v;
    }
  }

  // Asks for the listed pieces of tokens [first, end). A piece that lies by itself takes an address
  // translation of its own, the slowest part of it, and more so if the translation is not cached
  // either: a tile ahead, when gather asks again, is too late for some.
  static void ask(const DecodeAttentionParams& p, int batch, int head, int first, int end) {
    const Bases bases(p, batch, head);
    for_each_piece(p, batch, head, first, end, [&](int, std::int64_t slot, int) {
      if (bases.words) touch(bases.words + slot);
      touch(bases.k + slot * bases.step_k);
      touch(bases.v + slot * bases.step_v);
    });
  }

  void read_words(std::uint32_t* words) const {
    for (int i = 0; i < num_pieces; ++i) {
      const Piece& piece = pieces[i];
      if (piece.length == 1) {
        *words++ = *piece.words;
      } else {
        words = std::copy_n(piece.words, piece.length, words);
      }
    }
  }

 private:
  // Slot 0 of a KV head.
  struct Bases {
    const char *k, *v;
    std::int64_t step_k, step_v;  // bytes
    const std::uint32_t* words;

    Bases(const DecodeAttentionParams& p, int batch, int head) {
      const int size = size_of(p.kv_dtype);
      k = static_cast<const char*>(p.k) + (batch * p.stride_k_b + head * p.stride_k_h) * size;
      v = static_cast<const char*>(p.v) + (batch * p.stride_v_b + head * p.stride_v_h) * size;
      step_k = p.stride_k_t * size;
      step_v = p.stride_v_t * size;
      words = p.words ? p.words + batch * p.stride_words_b + head * p.stride_words_h : nullptr;
    }
  };

  template <class Visit>  // (token, slot, length) of each piece of tokens [first, end)
  [[gnu::always_inline]] static void for_each_piece(const DecodeAttentionParams& p, int batch,
                                                    int head, int first, int end,
                                                    const Visit& visit) {
    const std::int32_t* ids =
        p.page_ids ? p.page_ids + batch * p.stride_ids_b + head * p.stride_ids_h : nullptr;
    if (!ids) {
      visit(first, first, end - first);
    } else if (p.page_size == 1) {
      for (int at = first; at < end; ++at) {
        if (ids[at] >= 0) visit(at, ids[at] * std::int64_t{p.page_pitch}, 1);
      }
    } else {
      for (int at = first, page = first / p.page_size; at < end; ++page) {
        const int length = std::min((page + 1) * p.page_size, end) - at;
        const std::int64_t slot = ids[page] * std::int64_t{p.page_pitch} + at - page * p.page_size;
        if (ids[page] >= 0) visit(at, slot, length);
        at += length;
      }
    }
  }

  // Starts to fetch where a piece begins and, `last` bytes behind, ends.
  [[gnu::always_inline]] static void touch(const void* piece, std::int64_t last = 0) {
    __builtin_prefetch(piece, 0, 2);
    if (last > 0) __builtin_prefetch(static_cast<const char*>(piece) + last, 0, 2);
  }
};

}  // namespace kvcomp::cpu

// The tile registers of a thread, and squares of numbers in memory. Part of amx.cpp.

constexpr int kSide = 16;               // rows of a tile, and its words in a row
constexpr int kStep = 32;               // elements of bf16 in a row
constexpr int kSquare = kSide * kSide;  // words

// What was stored before is in memory: the compiler does not see that the instructions read it.
inline void written() { __asm__ volatile("" ::: "memory"); }

// The shapes of the registers while this lives; then the thread has those back that it had.
class Shapes {
 public:
  Shapes() { config_.palette = 1; }

  void set(int tile, int rows, int words) {
    config_.rows[tile] = static_cast<std::uint8_t>(rows);
    config_.bytes[tile] = static_cast<std::uint16_t>(words * 4);
  }
  void load() {
    _tile_storeconfig(&before_);
    written();
    _tile_loadconfig(&config_);
  }
  ~Shapes() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      written();
      _tile_loadconfig(&before_);
    }
  }
  Shapes(const Shapes&) = delete;
  Shapes& operator=(const Shapes&) = delete;

 private:
  struct alignas(64) Config {
    std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  static_assert(sizeof(Config) == 64);
  Config config_, before_;
};

// A square of words, by rows.
struct alignas(64) Square {
  float words[kSquare];

  void read(Vec (&rows)[kSide]) const {
    UNROLL for (int r = 0; r < kSide; ++r) rows[r] = load(words + r * kSide);
  }
};

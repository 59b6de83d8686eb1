/** The noise of PyTorch's `torch.randn` on a CPU, so that the same seed gives the picture that Python gives. */

const WORDS = 624;

/** MT19937 (Matsumoto and Nishimura 1998). */
class Twister {
  private readonly state = new Uint32Array(WORDS);
  private at = WORDS;

  constructor(seed: number) {
    this.state[0] = seed;
    for (let i = 1; i < WORDS; i++) {
      const before = this.state[i - 1]!;
      this.state[i] = Math.imul(1812433253, before ^ (before >>> 30)) + i;
    }
  }

  private refill(): void {
    const s = this.state;
    for (let i = 0; i < WORDS; i++) {
      const y = (s[i]! & 0x80000000) | (s[(i + 1) % WORDS]! & 0x7fffffff);
      s[i] = s[(i + 397) % WORDS]! ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.at = 0;
  }

  /** Return a number in [0, 1) with 24 bits, as a float32 is drawn. */
  uniform(): number {
    if (this.at === WORDS) this.refill();
    let y = this.state[this.at++]!;
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    y ^= y >>> 18;
    return (y & 0xffffff) / 0x1000000;
  }
}

/** Return a function that gives arrays of unit Gaussian noise; it continues where its last call ended. */
export function gaussian(seed: number): (count: number) => Float32Array<ArrayBuffer> {
  const source = new Twister(seed);
  return (count) => {
    // Box and Muller's transform of blocks of 16; the last block of an odd size is drawn anew. PyTorch has another
    // rule for less than 16 values.
    const out = new Float32Array(Math.max(count, 16));
    for (let i = 0; i < out.length; i++) out[i] = source.uniform();
    for (let first = 0; first + 16 <= out.length; first += 16) transform(out, first);
    if (out.length % 16) {
      const last = out.length - 16;
      for (let i = last; i < out.length; i++) out[i] = source.uniform();
      transform(out, last);
    }
    return out.slice(0, count);
  };
}

function transform(values: Float32Array, first: number): void {
  for (let i = first; i < first + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - values[i]!));
    const angle = 2 * Math.PI * values[i + 8]!;
    values[i] = radius * Math.cos(angle);
    values[i + 8] = radius * Math.sin(angle);
  }
}

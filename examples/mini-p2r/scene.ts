/**
 * The task: find one coloured digit in a megapixel. After Megapixel MNIST (Katharopoulos and
 * Fleuret 2019, "Processing Megapixel Images with Deep Attention-Sampling Models").
 *
 * A canvas is 1024 x 1024 RGB, the maximum at each pixel of these, drawn in this order:
 *  - texture: one of 16 grey backgrounds per split, value noise at three scales and white noise,
 *    rolled and mirrored at random;
 *  - 60 grey strokes: gently curving random walks of 12 to 40 pixels with a 2 or 3 pixel pen;
 *  - 24 fragments: squares of 8 to 11 pixels cropped from random digits, grey or coloured;
 *  - three needles: whole MNIST digits at their native 28 x 28, one red, one green, one blue.
 * The question is a colour, the answer that needle's class; each canvas gives three questions.
 *
 * A needle is inside one cell of a 32 x 32 lattice of 32-pixel cells, so that a cell is a box.
 * That is easier than free placement, which matters for reading the demo's figures.
 *
 * A scene is a description of about 8 KB, from which crops and the overview are rendered directly.
 * Backgrounds roll by whole blocks of 8 pixels, so the 8 x 8 means of the bare background are
 * precomputed, and only pixels under an object are visited.
 */
import { DIGIT_SIDE, type Digits } from './digits.js'
import { Rng } from './rng.js'

/** Sides are powers of two, so that coordinates wrap by a mask. */
export const CANVAS = 1024
/** Side of a cell, in pixels, and of the lattice, in cells. */
export const CELL = 32
export const LATTICE = CANVAS / CELL
/** Side of the overview, each of whose pixels is the mean of a block of the canvas. */
export const OVERVIEW = 128
const BLOCK = CANVAS / OVERVIEW
const CANVAS_SHIFT = Math.log2(CANVAS)
const OVERVIEW_SHIFT = Math.log2(OVERVIEW)
const BLOCK_SHIFT = Math.log2(BLOCK)
const CELL_SHIFT = Math.log2(CELL)
/** Side of the thumbnail, each of whose pixels is the mean of a cell. */
export const THUMBNAIL = LATTICE

export const COLOURS = ['red', 'green', 'blue'] as const
/** Questions a canvas. */
export const QUESTIONS = COLOURS.length

const BACKGROUNDS = 16
const STROKES = 60
const FRAGMENTS = 24
/** Minimum distance of needles in cells, so that no crop shows two. */
const NEEDLE_DISTANCE = 3
/** Tints at full intensity: grey, then the question's colours, which are pale enough to be seen. */
const PALETTE = [
  [1, 1, 1],
  [1, 0.3, 0.3],
  [0.3, 1, 0.3],
  [0.4, 0.4, 1],
] as const

/** RGB bytes of (tint << 8 | intensity), three a value. */
const RGB = Uint8Array.from(
  PALETTE.flatMap((tint) =>
    Array.from({ length: 256 }, (_, value) => tint.map((share) => Math.round(share * value))),
  ).flat(),
)

interface Background {
  /** Grey values of the canvas. */
  pixels: Uint8Array
  /** Sums over the 8 x 8 blocks. */
  blocks: Uint16Array
}

/** An object's bounding box, half open. */
interface Extent {
  x0: number
  y0: number
  x1: number
  y1: number
}

interface Stroke extends Extent {
  pen: number
  value: number
  /** The pen's upper left corner: x, y, x, y, ... */
  path: Int16Array
}

/** A digit, or a square cropped from one at (left, top). */
interface Sprite extends Extent {
  digit: number
  left: number
  top: number
  tint: number
}

export interface Scene {
  background: number
  rollX: number
  rollY: number
  mirrored: boolean
  strokes: readonly Stroke[]
  strokeExtents: Int16Array
  /** The fragments and the needles. */
  sprites: readonly Sprite[]
  spriteExtents: Int16Array
  /** In the order of COLOURS. */
  needles: readonly { cell: number; label: number }[]
}

export interface Question {
  /** Which canvas, and which of COLOURS. */
  canvas: number
  colour: number
  /** Where the needle is: row * 32 + column. */
  cell: number
  /** The digit's class. */
  label: number
}

export interface Overview {
  /** RGB bytes, 128 x 128. */
  pixels: Uint8Array
  /** RGB bytes, 32 x 32. */
  thumbnail: Uint8Array
}

/** A set of canvases, each a function of (seed, index) alone and generated on first access. */
export class Canvases {
  readonly count: number
  readonly #digits: Digits
  readonly #seed: number
  readonly #backgrounds: Background[] = []
  readonly #scenes: Scene[] = []
  readonly #overviews: Overview[] = []
  /** A canvas of (tint << 8 | intensity), 0 where no object is; cleared between calls. */
  readonly #layer = new Uint16Array(CANVAS * CANVAS)
  readonly #touched = new Int32Array(CANVAS * CANVAS)
  /** Of an overview in the making: sums of the background, what objects change, which blocks they change. */
  readonly #greys = new Int32Array(OVERVIEW * OVERVIEW)
  readonly #changes = new Int32Array(3 * OVERVIEW * OVERVIEW)
  readonly #isChanged = new Uint8Array(OVERVIEW * OVERVIEW)
  readonly #changedBlocks = new Int32Array(OVERVIEW * OVERVIEW)
  #drawn = 0

  constructor(digits: Digits, seed: number, count: number) {
    this.#digits = digits
    this.#seed = seed
    this.count = count
  }

  /** Questions 0 .. 3 count - 1, a canvas's three together. */
  question(index: number): Question {
    const canvas = Math.floor(index / QUESTIONS)
    const colour = index % QUESTIONS
    const { cell, label } = this.scene(canvas).needles[colour] as Scene['needles'][number]
    return { canvas, colour, cell, label }
  }

  scene(index: number): Scene {
    this.#scenes[index] ??= makeScene(this.#digits, new Rng(this.#seed, 1, index))
    return this.#scenes[index]
  }

  /** The 8 x 8 means of the canvas, rounded to bytes, and the 32 x 32 ones. Kept: 51 KB a canvas. */
  overview(index: number): Overview {
    this.#overviews[index] ??= this.#renderOverview(this.scene(index))
    return this.#overviews[index]
  }

  /** A cell at full resolution: RGB bytes, 32 x 32. */
  crop(index: number, cell: number): Uint8Array {
    const x = (cell % LATTICE) * CELL
    const y = Math.floor(cell / LATTICE) * CELL
    return this.#render(this.scene(index), { x0: x, y0: y, x1: x + CELL, y1: y + CELL })
  }

  /** The whole canvas: RGB bytes, 3 MB. */
  canvas(index: number): Uint8Array {
    return this.#render(this.scene(index), { x0: 0, y0: 0, x1: CANVAS, y1: CANVAS })
  }

  #background({ background: index }: Scene): Background {
    this.#backgrounds[index] ??= makeBackground(new Rng(this.#seed, 0, index))
    return this.#backgrounds[index]
  }

  #render(scene: Scene, window: Extent): Uint8Array {
    const touched = this.#paint(scene, window)
    const background = this.#background(scene)
    const width = window.x1 - window.x0
    const out = new Uint8Array(3 * width * (window.y1 - window.y0))
    let at = 0
    for (let y = window.y0; y < window.y1; y++) {
      const row = ((y + scene.rollY) & (CANVAS - 1)) * CANVAS
      for (let x = window.x0; x < window.x1; x++, at += 3) {
        const grey = background.pixels[row + sourceX(scene, x)] as number
        const object = this.#layer[y * CANVAS + x] as number
        const colour = 3 * ((object & 255) > grey ? object : grey)
        out[at] = RGB[colour] as number
        out[at + 1] = RGB[colour + 1] as number
        out[at + 2] = RGB[colour + 2] as number
      }
    }
    this.#wipe(touched)
    return out
  }

  #renderOverview(scene: Scene): Overview {
    const background = this.#background(scene)
    const [rollX, rollY] = [scene.rollX / BLOCK, scene.rollY / BLOCK]
    // The bare background first: it is grey, and most blocks stay so.
    const greys = this.#greys
    const pixels = new Uint8Array(3 * OVERVIEW * OVERVIEW)
    const cells = new Int32Array(3 * THUMBNAIL * THUMBNAIL)
    let block = 0
    for (let y = 0; y < OVERVIEW; y++) {
      const row = ((y + rollY) & (OVERVIEW - 1)) * OVERVIEW
      for (let x = 0; x < OVERVIEW; x++, block++) {
        // A mirrored block holds the same pixels as its source, so its sum is the same.
        const column = ((scene.mirrored ? OVERVIEW - 1 - x : x) + rollX) & (OVERVIEW - 1)
        const sum = background.blocks[row + column] as number
        greys[block] = sum
        const grey = meanOf(sum, BLOCK_SHIFT)
        pixels[3 * block] = grey
        pixels[3 * block + 1] = grey
        pixels[3 * block + 2] = grey
        addToCell(cells, block, sum, sum, sum)
      }
    }
    // What the objects change of each block's sums.
    const changes = this.#changes
    const painted = this.#paint(scene, { x0: 0, y0: 0, x1: CANVAS, y1: CANVAS })
    let changed = 0
    for (let i = 0; i < painted; i++) {
      const pixel = this.#touched[i] as number
      const object = this.#layer[pixel] as number
      this.#layer[pixel] = 0
      const x = pixel & (CANVAS - 1)
      const y = pixel >> CANVAS_SHIFT
      const row = ((y + scene.rollY) & (CANVAS - 1)) * CANVAS
      const grey = background.pixels[row + sourceX(scene, x)] as number
      if ((object & 255) <= grey) continue
      const at = (y >> BLOCK_SHIFT) * OVERVIEW + (x >> BLOCK_SHIFT)
      const colour = 3 * object
      if (this.#isChanged[at] === 0) {
        this.#isChanged[at] = 1
        this.#changedBlocks[changed++] = at
      }
      changes[3 * at] = (changes[3 * at] as number) + (RGB[colour] as number) - grey
      changes[3 * at + 1] = (changes[3 * at + 1] as number) + (RGB[colour + 1] as number) - grey
      changes[3 * at + 2] = (changes[3 * at + 2] as number) + (RGB[colour + 2] as number) - grey
    }
    for (let i = 0; i < changed; i++) {
      const at = this.#changedBlocks[i] as number
      const red = changes[3 * at] as number
      const green = changes[3 * at + 1] as number
      const blue = changes[3 * at + 2] as number
      const grey = greys[at] as number
      pixels[3 * at] = meanOf(grey + red, BLOCK_SHIFT)
      pixels[3 * at + 1] = meanOf(grey + green, BLOCK_SHIFT)
      pixels[3 * at + 2] = meanOf(grey + blue, BLOCK_SHIFT)
      addToCell(cells, at, red, green, blue)
      this.#isChanged[at] = 0
      changes.fill(0, 3 * at, 3 * at + 3)
    }
    const thumbnail = new Uint8Array(cells.length)
    for (let i = 0; i < cells.length; i++) thumbnail[i] = meanOf(cells[i] as number, CELL_SHIFT)
    return { pixels, thumbnail }
  }

  /** Draws the objects that intersect the window onto the layer; returns the number of pixels drawn. */
  #paint(scene: Scene, window: Extent): number {
    this.#drawn = 0
    for (const stroke of intersecting(scene.strokes, scene.strokeExtents, window)) {
      const inside = within(stroke, window)
      const { path, pen, value } = stroke
      for (let i = 0; i < path.length; i += 2) {
        const x = path[i] as number
        const y = path[i + 1] as number
        for (let dy = 0; dy < pen; dy++) {
          for (let dx = 0; dx < pen; dx++) {
            if (inside || holds(window, x + dx, y + dy)) this.#put(x + dx, y + dy, value, 0)
          }
        }
      }
    }
    for (const sprite of intersecting(scene.sprites, scene.spriteExtents, window)) {
      const { x0, y0, digit, left, top, tint } = sprite
      const [firstX, lastX] = [Math.max(x0, window.x0), Math.min(sprite.x1, window.x1)]
      const [firstY, lastY] = [Math.max(y0, window.y0), Math.min(sprite.y1, window.y1)]
      for (let y = firstY; y < lastY; y++) {
        const row = (digit * DIGIT_SIDE + top + y - y0) * DIGIT_SIDE + left - x0
        for (let x = firstX; x < lastX; x++) {
          this.#put(x, y, this.#digits.pixels[row + x] as number, tint)
        }
      }
    }
    return this.#drawn
  }

  #put(x: number, y: number, value: number, tint: number): void {
    const pixel = y * CANVAS + x
    const before = this.#layer[pixel] as number
    if (value <= (before & 255)) return
    if (before === 0) this.#touched[this.#drawn++] = pixel
    this.#layer[pixel] = (tint << 8) | value
  }

  #wipe(touched: number): void {
    for (let i = 0; i < touched; i++) this.#layer[this.#touched[i] as number] = 0
  }
}

/** The column of the background that is column x of a scene. */
function sourceX(scene: Scene, x: number): number {
  return ((scene.mirrored ? CANVAS - 1 - x : x) + scene.rollX) & (CANVAS - 1)
}

/** x0, y0, x1, y1 of each object: searched without touching the objects, which are all over memory. */
function extentsOf(objects: readonly Extent[]): Int16Array {
  return Int16Array.from(objects.flatMap(({ x0, y0, x1, y1 }) => [x0, y0, x1, y1]))
}

/** The objects that intersect the window, in their order. */
function intersecting<T>(objects: readonly T[], extents: Int16Array, window: Extent): T[] {
  const found: T[] = []
  for (let i = 0; i < objects.length; i++) {
    if (
      (extents[4 * i] as number) < window.x1 &&
      (extents[4 * i + 1] as number) < window.y1 &&
      (extents[4 * i + 2] as number) > window.x0 &&
      (extents[4 * i + 3] as number) > window.y0
    ) {
      found.push(objects[i] as T)
    }
  }
  return found
}

function within(a: Extent, window: Extent): boolean {
  return a.x0 >= window.x0 && a.x1 <= window.x1 && a.y0 >= window.y0 && a.y1 <= window.y1
}

function holds(window: Extent, x: number, y: number): boolean {
  return x >= window.x0 && x < window.x1 && y >= window.y0 && y < window.y1
}

/** The mean of a square of pixels, of side 2^shift, from its sum; ties upwards. */
function meanOf(sum: number, shift: number): number {
  return (sum + (1 << (2 * shift - 1))) >> (2 * shift)
}

/** Adds to the sums of the cell that a block of the overview is in. */
function addToCell(
  cells: Int32Array,
  block: number,
  red: number,
  green: number,
  blue: number,
): void {
  const row = (block >> OVERVIEW_SHIFT) >> (CELL_SHIFT - BLOCK_SHIFT)
  const column = (block & (OVERVIEW - 1)) >> (CELL_SHIFT - BLOCK_SHIFT)
  const cell = 3 * (row * THUMBNAIL + column)
  cells[cell] = (cells[cell] as number) + red
  cells[cell + 1] = (cells[cell + 1] as number) + green
  cells[cell + 2] = (cells[cell + 2] as number) + blue
}

function makeScene(digits: Digits, rng: Rng): Scene {
  const scene = {
    background: rng.below(BACKGROUNDS),
    rollX: rng.below(OVERVIEW) * BLOCK,
    rollY: rng.below(OVERVIEW) * BLOCK,
    mirrored: rng.unit() < 0.5,
  }
  const strokes = Array.from({ length: STROKES }, () => makeStroke(rng))
  const sprites: Sprite[] = Array.from({ length: FRAGMENTS }, () => {
    const side = 8 + rng.below(4)
    const x = rng.below(CANVAS - side)
    const y = rng.below(CANVAS - side)
    // From 6 on: the middle of the digit, so that fragments are rarely blank.
    const left = 6 + rng.below(DIGIT_SIDE - 6 - side)
    const top = 6 + rng.below(DIGIT_SIDE - 6 - side)
    const tint = rng.below(PALETTE.length)
    return { ...square(x, y, side), digit: rng.below(digits.count), left, top, tint }
  })
  const cells: number[] = []
  while (cells.length < QUESTIONS) {
    const cell = rng.below(LATTICE * LATTICE)
    if (cells.every((other) => cellDistance(cell, other) >= NEEDLE_DISTANCE)) cells.push(cell)
  }
  const needles = cells.map((cell, colour) => {
    const digit = rng.below(digits.count)
    const x = (cell % LATTICE) * CELL + rng.below(CELL - DIGIT_SIDE + 1)
    const y = Math.floor(cell / LATTICE) * CELL + rng.below(CELL - DIGIT_SIDE + 1)
    sprites.push({ ...square(x, y, DIGIT_SIDE), digit, left: 0, top: 0, tint: colour + 1 })
    return { cell, label: digits.labels[digit] as number }
  })
  const extents = { strokeExtents: extentsOf(strokes), spriteExtents: extentsOf(sprites) }
  return { ...scene, strokes, sprites, ...extents, needles }
}

function square(x: number, y: number, side: number): Extent {
  return { x0: x, y0: y, x1: x + side, y1: y + side }
}

/** Chebyshev distance, in cells. */
function cellDistance(a: number, b: number): number {
  const rows = Math.abs(Math.floor(a / LATTICE) - Math.floor(b / LATTICE))
  return Math.max(rows, Math.abs((a % LATTICE) - (b % LATTICE)))
}

function makeStroke(rng: Rng): Stroke {
  const MARGIN = 20
  let x = rng.between(MARGIN, CANVAS - MARGIN)
  let y = rng.between(MARGIN, CANVAS - MARGIN)
  let angle = rng.between(0, 2 * Math.PI)
  const length = 12 + rng.below(29)
  const pen = 2 + rng.below(2)
  const value = 105 + rng.below(95)
  const turn = 0.06 * rng.normal()
  const path = new Int16Array(2 * length)
  const extent = { x0: CANVAS, y0: CANVAS, x1: 0, y1: 0 }
  for (let step = 0; step < length; step++) {
    const left = Math.floor(x)
    const top = Math.floor(y)
    path[2 * step] = left
    path[2 * step + 1] = top
    extent.x0 = Math.min(extent.x0, left)
    extent.y0 = Math.min(extent.y0, top)
    extent.x1 = Math.max(extent.x1, left + pen)
    extent.y1 = Math.max(extent.y1, top + pen)
    x += Math.cos(angle)
    y += Math.sin(angle)
    angle += turn
  }
  return { ...extent, pen, value, path }
}

function makeBackground(rng: Rng): Background {
  const octaves = [
    { cells: 8, share: 0.1, lattice: noise(rng, 8) },
    { cells: 32, share: 0.08, lattice: noise(rng, 32) },
    { cells: 128, share: 0.06, lattice: noise(rng, 128) },
  ]
  const FLOOR = 0.06
  const GRAIN = 0.06
  const pixels = new Uint8Array(CANVAS * CANVAS)
  const blocks = new Uint16Array(OVERVIEW * OVERVIEW)
  const row = new Float64Array(CANVAS)
  for (let y = 0; y < CANVAS; y++) {
    row.fill(FLOOR)
    for (const { cells, share, lattice } of octaves) addNoiseRow(row, y, cells, share, lattice)
    const blockRow = Math.floor(y / BLOCK) * OVERVIEW
    for (let x = 0; x < CANVAS; x++) {
      const value = Math.round(255 * ((row[x] as number) + GRAIN * rng.unit()))
      pixels[y * CANVAS + x] = value
      const block = blockRow + Math.floor(x / BLOCK)
      blocks[block] = (blocks[block] as number) + value
    }
  }
  return { pixels, blocks }
}

function noise(rng: Rng, cells: number): Float64Array {
  return Float64Array.from({ length: cells * cells }, () => rng.unit())
}

/** Adds a row of bilinear value noise with a periodic lattice, so that rolling leaves no seam. */
function addNoiseRow(
  row: Float64Array,
  y: number,
  cells: number,
  share: number,
  lattice: Float64Array,
): void {
  const step = CANVAS / cells
  const top = Math.floor(y / step)
  const down = (y % step) / step
  const upper = top * cells
  const lower = ((top + 1) % cells) * cells
  for (let cell = 0; cell < cells; cell++) {
    const next = (cell + 1) % cells
    const left = mix(lattice[upper + cell] as number, lattice[lower + cell] as number, down)
    const right = mix(lattice[upper + next] as number, lattice[lower + next] as number, down)
    for (let i = 0; i < step; i++) {
      const x = cell * step + i
      row[x] = (row[x] as number) + share * mix(left, right, i / step)
    }
  }
}

function mix(a: number, b: number, t: number): number {
  return a + (b - a) * t
}

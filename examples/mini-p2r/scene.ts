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
/** In pixels. */
const SHORTEST_STROKE = 12
const LONGEST_STROKE = 40
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

/** A window of the canvas, half open. */
interface Extent {
  x0: number
  y0: number
  x1: number
  y1: number
}

/** Numbers of an object in a scene's lists, which begin with its bounding box: x0, y0, x1, y1. */
const FIELDS = 8

/** Objects are rows of integers: thousands of scenes as objects would keep the garbage collector busy. */
export interface Scene {
  background: number
  rollX: number
  rollY: number
  mirrored: boolean
  /** Rows of: box (4), pen, intensity, first and last index into `paths`. */
  strokes: Int32Array
  /** The pen's upper left corners: x, y, x, y, ... */
  paths: Int16Array
  /** The fragments, then the needles: squares at (left, top) of a digit. Rows of: box (4), digit, left, top, tint. */
  sprites: Int32Array
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
  readonly #needleCrops: Uint8Array[] = []
  /** A canvas of (tint << 8 | intensity), 0 where no object is; cleared between calls. */
  readonly #layer = new Uint16Array(CANVAS * CANVAS)
  readonly #touched = new Int32Array(CANVAS * CANVAS)
  /** Of an overview in the making: sums of the background, what objects change, which blocks they change. */
  readonly #greys = new Int32Array(OVERVIEW * OVERVIEW)
  readonly #changes = new Int32Array(3 * OVERVIEW * OVERVIEW)
  readonly #isChanged = new Uint8Array(OVERVIEW * OVERVIEW)
  readonly #changedBlocks = new Int32Array(OVERVIEW * OVERVIEW)

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

  /** A cell at full resolution: RGB bytes, 32 x 32. Kept where it holds a needle, 3 KB each. */
  crop(index: number, cell: number): Uint8Array {
    const needle = this.scene(index).needles.findIndex((other) => other.cell === cell)
    if (needle < 0) return this.#renderCell(index, cell)
    const at = QUESTIONS * index + needle
    this.#needleCrops[at] ??= this.#renderCell(index, cell)
    return this.#needleCrops[at]
  }

  #renderCell(index: number, cell: number): Uint8Array {
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
    const pixels = new Uint8Array(3 * OVERVIEW * OVERVIEW)
    const cells = new Int32Array(3 * THUMBNAIL * THUMBNAIL)
    // The bare background first: it is grey, and most blocks stay so.
    this.#greyOverview(scene, pixels, cells)
    const painted = this.#paint(scene, { x0: 0, y0: 0, x1: CANVAS, y1: CANVAS })
    this.#applyChanges(this.#sumChanges(scene, painted), pixels, cells)
    const thumbnail = new Uint8Array(cells.length)
    for (let i = 0; i < cells.length; i++) thumbnail[i] = meanOf(cells[i] as number, CELL_SHIFT)
    return { pixels, thumbnail }
  }

  /** The overview of the bare background, and the sums of its cells. */
  #greyOverview(scene: Scene, pixels: Uint8Array, cells: Int32Array): void {
    const { blocks } = this.#background(scene)
    const [rollX, rollY] = [scene.rollX / BLOCK, scene.rollY / BLOCK]
    // A mirrored block holds the same pixels as its source, so its sum is the same.
    const [first, step] = scene.mirrored ? [OVERVIEW - 1 + rollX, -1] : [rollX, 1]
    const greys = this.#greys
    let block = 0
    for (let y = 0; y < OVERVIEW; y++) {
      const row = ((y + rollY) & (OVERVIEW - 1)) * OVERVIEW
      for (let x = 0; x < OVERVIEW; x++, block++) {
        const sum = blocks[row + ((first + step * x) & (OVERVIEW - 1))] as number
        greys[block] = sum
        const grey = meanOf(sum, BLOCK_SHIFT)
        pixels[3 * block] = grey
        pixels[3 * block + 1] = grey
        pixels[3 * block + 2] = grey
        addToCell(cells, block, sum, sum, sum)
      }
    }
  }

  /** Sums up what the painted objects change of each block, and clears the layer; returns the number of blocks. */
  #sumChanges(scene: Scene, painted: number): number {
    const background = this.#background(scene).pixels
    const [layer, touched, changes] = [this.#layer, this.#touched, this.#changes]
    const [isChanged, changedBlocks] = [this.#isChanged, this.#changedBlocks]
    const { rollY } = scene
    let changed = 0
    for (let i = 0; i < painted; i++) {
      const pixel = touched[i] as number
      const object = layer[pixel] as number
      layer[pixel] = 0
      const x = pixel & (CANVAS - 1)
      const y = pixel >> CANVAS_SHIFT
      const row = ((y + rollY) & (CANVAS - 1)) * CANVAS
      const grey = background[row + sourceX(scene, x)] as number
      if ((object & 255) <= grey) continue
      const at = (y >> BLOCK_SHIFT) * OVERVIEW + (x >> BLOCK_SHIFT)
      const colour = 3 * object
      if (isChanged[at] === 0) {
        isChanged[at] = 1
        changedBlocks[changed++] = at
      }
      changes[3 * at] = (changes[3 * at] as number) + (RGB[colour] as number) - grey
      changes[3 * at + 1] = (changes[3 * at + 1] as number) + (RGB[colour + 1] as number) - grey
      changes[3 * at + 2] = (changes[3 * at + 2] as number) + (RGB[colour + 2] as number) - grey
    }
    return changed
  }

  /** Adds the changes to the overview and to the sums of its cells, and clears them. */
  #applyChanges(changed: number, pixels: Uint8Array, cells: Int32Array): void {
    const [greys, changes, isChanged] = [this.#greys, this.#changes, this.#isChanged]
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
      isChanged[at] = 0
      changes[3 * at] = 0
      changes[3 * at + 1] = 0
      changes[3 * at + 2] = 0
    }
  }

  /** Draws the objects that intersect the window onto the layer; returns the number of pixels drawn. */
  #paint(scene: Scene, window: Extent): number {
    const [layer, touched, digits] = [this.#layer, this.#touched, this.#digits.pixels]
    const { strokes, paths, sprites } = scene
    let drawn = 0
    // Each pixel is the maximum of the objects over it.
    const put = (pixel: number, value: number, tint: number): void => {
      const before = layer[pixel] as number
      if (value <= (before & 255)) return
      if (before === 0) touched[drawn++] = pixel
      layer[pixel] = (tint << 8) | value
    }
    for (let at = 0; at < strokes.length; at += FIELDS) {
      if (!intersects(strokes, at, window)) continue
      const inside = isWithin(strokes, at, window)
      const [pen, value] = [strokes[at + 4] as number, strokes[at + 5] as number]
      const [from, to] = [strokes[at + 6] as number, strokes[at + 7] as number]
      for (let i = from; i < to; i += 2) {
        const x = paths[i] as number
        const y = paths[i + 1] as number
        for (let dy = 0; dy < pen; dy++) {
          for (let dx = 0; dx < pen; dx++) {
            if (inside || holds(window, x + dx, y + dy)) put((y + dy) * CANVAS + x + dx, value, 0)
          }
        }
      }
    }
    for (let at = 0; at < sprites.length; at += FIELDS) {
      if (!intersects(sprites, at, window)) continue
      const [x0, y0] = [sprites[at] as number, sprites[at + 1] as number]
      const [x1, y1] = [sprites[at + 2] as number, sprites[at + 3] as number]
      const [digit, left] = [sprites[at + 4] as number, sprites[at + 5] as number]
      const [top, tint] = [sprites[at + 6] as number, sprites[at + 7] as number]
      const [firstX, lastX] = [Math.max(x0, window.x0), Math.min(x1, window.x1)]
      const [firstY, lastY] = [Math.max(y0, window.y0), Math.min(y1, window.y1)]
      for (let y = firstY; y < lastY; y++) {
        const row = (digit * DIGIT_SIDE + top + y - y0) * DIGIT_SIDE + left - x0
        for (let x = firstX; x < lastX; x++) put(y * CANVAS + x, digits[row + x] as number, tint)
      }
    }
    return drawn
  }

  #wipe(touched: number): void {
    for (let i = 0; i < touched; i++) this.#layer[this.#touched[i] as number] = 0
  }
}

/** The column of the background that is column x of a scene. */
function sourceX(scene: Scene, x: number): number {
  return ((scene.mirrored ? CANVAS - 1 - x : x) + scene.rollX) & (CANVAS - 1)
}

/** Whether the box at `at` and the window have a pixel in common. */
function intersects(objects: Int32Array, at: number, { x0, y0, x1, y1 }: Extent): boolean {
  return (
    (objects[at] as number) < x1 &&
    (objects[at + 1] as number) < y1 &&
    (objects[at + 2] as number) > x0 &&
    (objects[at + 3] as number) > y0
  )
}

function isWithin(objects: Int32Array, at: number, { x0, y0, x1, y1 }: Extent): boolean {
  return (
    (objects[at] as number) >= x0 &&
    (objects[at + 1] as number) >= y0 &&
    (objects[at + 2] as number) <= x1 &&
    (objects[at + 3] as number) <= y1
  )
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
  const strokes = new Int32Array(FIELDS * STROKES)
  const longest = new Int16Array(2 * STROKES * LONGEST_STROKE)
  let drawn = 0
  for (let i = 0; i < STROKES; i++) drawn = drawStroke(rng, strokes, FIELDS * i, longest, drawn)

  const sprites = new Int32Array(FIELDS * (FRAGMENTS + QUESTIONS))
  const addSprite = (
    index: number,
    [x, y]: readonly [number, number],
    side: number,
    ...source: readonly [digit: number, left: number, top: number, tint: number]
  ): void => sprites.set([x, y, x + side, y + side, ...source], FIELDS * index)
  for (let i = 0; i < FRAGMENTS; i++) {
    const side = 8 + rng.below(4)
    const x = rng.below(CANVAS - side)
    const y = rng.below(CANVAS - side)
    // From 6 on: the middle of the digit, so that fragments are rarely blank.
    const left = 6 + rng.below(DIGIT_SIDE - 6 - side)
    const top = 6 + rng.below(DIGIT_SIDE - 6 - side)
    const tint = rng.below(PALETTE.length)
    addSprite(i, [x, y], side, rng.below(digits.count), left, top, tint)
  }
  const cells: number[] = []
  while (cells.length < QUESTIONS) {
    const cell = rng.below(LATTICE * LATTICE)
    if (cells.every((other) => cellDistance(cell, other) >= NEEDLE_DISTANCE)) cells.push(cell)
  }
  const needles = cells.map((cell, colour) => {
    const digit = rng.below(digits.count)
    const x = (cell % LATTICE) * CELL + rng.below(CELL - DIGIT_SIDE + 1)
    const y = Math.floor(cell / LATTICE) * CELL + rng.below(CELL - DIGIT_SIDE + 1)
    addSprite(FRAGMENTS + colour, [x, y], DIGIT_SIDE, digit, 0, 0, colour + 1)
    return { cell, label: digits.labels[digit] as number }
  })
  return { ...scene, strokes, paths: longest.slice(0, drawn), sprites, needles }
}

/** Chebyshev distance, in cells. */
function cellDistance(a: number, b: number): number {
  const rows = Math.abs(Math.floor(a / LATTICE) - Math.floor(b / LATTICE))
  return Math.max(rows, Math.abs((a % LATTICE) - (b % LATTICE)))
}

/** Draws a stroke into `paths` from `from` on and into the row at `at`; returns where its path ends. */
function drawStroke(
  rng: Rng,
  strokes: Int32Array,
  at: number,
  paths: Int16Array,
  from: number,
): number {
  const MARGIN = 20
  let x = rng.between(MARGIN, CANVAS - MARGIN)
  let y = rng.between(MARGIN, CANVAS - MARGIN)
  let angle = rng.between(0, 2 * Math.PI)
  const length = SHORTEST_STROKE + rng.below(LONGEST_STROKE - SHORTEST_STROKE + 1)
  const pen = 2 + rng.below(2)
  const value = 105 + rng.below(95)
  const turn = 0.06 * rng.normal()
  const to = from + 2 * length
  let [x0, y0, x1, y1] = [CANVAS, CANVAS, 0, 0]
  for (let i = from; i < to; i += 2) {
    const left = Math.floor(x)
    const top = Math.floor(y)
    paths[i] = left
    paths[i + 1] = top
    if (left < x0) x0 = left
    if (left > x1) x1 = left
    if (top < y0) y0 = top
    if (top > y1) y1 = top
    x += Math.cos(angle)
    y += Math.sin(angle)
    angle += turn
  }
  strokes.set([x0, y0, x1 + pen, y1 + pen, pen, value, from, to], at)
  return to
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

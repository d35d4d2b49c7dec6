/** Pictures of answered questions: boxes on images, and the canvas beside the Reasoner's crop. */
import {
  cropResample,
  type Device,
  drawBoxes,
  encodeImage,
  saveImage,
  scopeAsync,
} from 'p2r-kernels'
import type { Example } from './report.js'
import { CANVAS, type Canvases, CELL, LATTICE } from './scene.js'

/** The images of an example, as data URLs. */
export interface ExampleImages {
  /** The canvas at half its size: JPEG. */
  canvas: string
  /** The cell at full resolution: PNG. */
  crop: string
}

export async function imagesOf(
  device: Device,
  canvases: Canvases,
  { canvas: index, cell }: Example,
): Promise<ExampleImages> {
  return scopeAsync(async () => {
    const canvas = device.tensor(canvases.canvas(index), [CANVAS, CANVAS, 3], 'u8')
    const side = CANVAS / 2
    const regions = [{ box: [0, 0, CANVAS, CANVAS] as const, height: side, width: side }]
    const [half = canvas] = cropResample({ image: canvas, regions, filter: 'box' })
    const crop = device.tensor(canvases.crop(index, cell), [CELL, CELL, 3], 'u8')
    const [jpeg, png] = await Promise.all([
      encodeImage(half, { format: 'jpeg', quality: 75 }),
      encodeImage(crop),
    ])
    return { canvas: dataUrl('image/jpeg', jpeg), crop: dataUrl('image/png', png) }
  })
}

function dataUrl(type: string, bytes: Uint8Array): string {
  return `data:${type};base64,${Buffer.from(bytes).toString('base64')}`
}

export async function saveCanvas(
  device: Device,
  canvases: Canvases,
  index: number,
  path: string,
): Promise<void> {
  using image = device.tensor(canvases.canvas(index), [CANVAS, CANVAS, 3], 'u8')
  await saveImage(image, path)
}

/** Outlines cells just outside their edges, so that no pixel of a digit is covered. */
export async function saveAnnotated(
  image: Parameters<typeof drawBoxes>[0]['image'],
  cells: readonly number[],
  path: string,
): Promise<void> {
  const [height, width] = image.shape as [number, number, number]
  const LINE = Math.max(3, Math.floor(0.003 * width))
  const boxes = cells.map((cell) => {
    const [x0, y0, x1, y1] = cellBox(cell, height, width)
    return [x0 - LINE, y0 - LINE, x1 - 1 + LINE, y1 - 1 + LINE] as const
  })
  const yellow = [255, 255, 0] as const
  await saveImage(drawBoxes({ image, boxes, colors: [yellow], width: LINE }), path)
}

/** A cell's box in an image of any size, half open. */
export function cellBox(
  cell: number,
  height: number,
  width: number,
): readonly [number, number, number, number] {
  const [column, row] = [cell % LATTICE, Math.floor(cell / LATTICE)]
  const at = (i: number, size: number): number => Math.floor((i * size) / LATTICE)
  return [at(column, width), at(row, height), at(column + 1, width), at(row + 1, height)]
}

/** Size of `evidenceSvg` in its own units, of which a cell is one. */
const EVIDENCE = { width: 53, height: 32, cropSide: 17, margin: 1.5 } as const

/**
 * What the Reasoner saw, as an SVG element: the canvas with the Perceiver's box, and the crop, joined
 * by lines. Where the box misses the digit, a dashed box shows the digit's own cell. `placement` is
 * attributes of the element, such as its width.
 */
export function evidenceSvg(
  { cell, trueCell, hit }: Example,
  { canvas, crop }: ExampleImages,
  description: string,
  placement = '',
): string {
  const { width, height, cropSide, margin } = EVIDENCE
  const GAP = 0.3
  const side = 1 + 2 * GAP
  const outline = (at: number, paint: string): string => {
    const [column, row] = [at % LATTICE, Math.floor(at / LATTICE)]
    const box = `x="${column - GAP}" y="${row - GAP}" width="${side}" height="${side}"`
    return `<rect ${box} fill="none" ${paint}/>`
  }
  const left = width - margin - cropSide
  const top = (height - cropSide) / 2
  const right = (cell % LATTICE) + 1 + GAP
  const upper = Math.floor(cell / LATTICE) - GAP
  const lines = `M${right} ${upper}L${left} ${top}M${right} ${upper + side}L${left} ${top + cropSide}`
  return [
    `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${description}" ${placement}>`,
    `<image href="${canvas}" width="${LATTICE}" height="${LATTICE}"/>`,
    `<path d="${lines}" stroke="#ffe14d" stroke-width="0.12" stroke-opacity="0.75"/>`,
    outline(cell, 'stroke="#ffe14d" stroke-width="0.35"'),
    hit ? '' : outline(trueCell, 'stroke="#fff" stroke-width="0.3" stroke-dasharray="0.5 0.35"'),
    `<image href="${crop}" x="${left}" y="${top}" width="${cropSide}" height="${cropSide}" style="image-rendering:pixelated"/>`,
    `<rect x="${left}" y="${top}" width="${cropSide}" height="${cropSide}" fill="none" stroke="#ffe14d" stroke-width="0.3"/>`,
    '</svg>',
  ].join('')
}

/** One example as a picture for a README: an SVG file with the evidence, the question and the answer. */
export function exampleSvg(example: Example, images: ExampleImages): string {
  const { question, answer, truth, answerProbability } = example
  const description = `${question} The Perceiver's box on the canvas, its crop, and the Reasoner's answer: ${answer}`
  const PAD = 24
  const SCALE = 10.5
  const shown = { width: SCALE * EVIDENCE.width, height: SCALE * EVIDENCE.height }
  const text = shown.width + 2 * PAD
  const [width, height] = [text + 290, shown.height + 2 * PAD]
  const placement = `x="${PAD}" y="${PAD}" width="${shown.width}" height="${shown.height}"`
  const line = (y: number, size: number, fill: string, words: string): string =>
    `<text x="${text}" y="${y}" font-size="${size}" fill="${fill}">${words}</text>`
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" font-family="system-ui, 'Segoe UI', Helvetica, Arial, sans-serif">`,
    `<title>${description}</title>`,
    `<rect width="${width}" height="${height}" rx="14" fill="#14161a"/>`,
    evidenceSvg(example, images, description, placement),
    line(PAD + 40, 15, '#a3a8b1', 'Question'),
    line(PAD + 70, 25, '#f2f2ef', question),
    line(PAD + 122, 15, '#a3a8b1', 'Perceiver'),
    line(PAD + 145, 17, '#ffe14d', 'one box of 1024'),
    line(PAD + 197, 15, '#a3a8b1', 'Reasoner'),
    line(PAD + 264, 72, '#f2f2ef', String(answer)),
    line(PAD + 300, 15, '#a3a8b1', `${percent(answerProbability)} sure; the truth is ${truth}`),
    '</svg>\n',
  ].join('\n')
}

/** A probability for people: certainty is not claimed by rounding. */
export function percent(probability: number): string {
  if (probability > 0.99) return 'over 99 %'
  if (probability < 0.01) return 'under 1 %'
  return `${Math.round(100 * probability)} %`
}

import { cropResample, loadImage, scopeAsync, type Tensor } from 'p2r-kernels'
import { stack } from './batch.js'
import { type Prediction, predict, type System } from './evaluate.js'
import { cellBox, saveAnnotated } from './pictures.js'
import type { Evidence } from './policy.js'
import { CELL, COLOURS, OVERVIEW, THUMBNAIL } from './scene.js'

/** Predictions for an image file, one per colour in COLOURS; saves it with the boxes drawn. */
export async function answerImage(
  system: System,
  file: string,
  annotated: string,
): Promise<Prediction[]> {
  const { device } = system
  return scopeAsync(async () => {
    const image = await loadImage(file, device)
    const [height, width] = image.shape as [number, number, number]
    if (Math.min(height, width) < OVERVIEW) {
      throw new Error(
        `${file} is ${width} x ${height}, and the demo reads ${OVERVIEW} x ${OVERVIEW} or more`,
      )
    }
    const colours = Array.from(COLOURS, (_, i) => i)

    /** The whole image at a smaller size, once per question. */
    const reduced = async (side: number): Promise<Tensor> => {
      const box = [0, 0, width, height] as const
      const regions = [{ box, height: side, width: side }]
      const [small] = cropResample({ image, regions, filter: 'box' })
      const pixels = Uint8Array.from((await small?.read()) ?? [])
      return stack(
        device,
        colours.map(() => pixels),
        side,
      )
    }
    const evidenceAt = async (cells: number[]): Promise<Evidence> => {
      const regions = cells.map((cell) => ({
        box: cellBox(cell, height, width),
        height: CELL,
        width: CELL,
      }))
      const crops = await Promise.all(cropResample({ image, regions }).map((crop) => crop.read()))
      const pixels = crops.map((crop) => Uint8Array.from(crop))
      return { crops: stack(device, pixels, CELL), thumbnails: await reduced(THUMBNAIL), cells }
    }
    const predictions = await predict(system, await reduced(OVERVIEW), colours, evidenceAt)
    const cells = predictions.map(({ cell }) => cell)
    await saveAnnotated(image, cells, annotated)
    return predictions
  })
}

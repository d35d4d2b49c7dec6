import { cropResample, loadImage, scopeAsync, type Tensor } from 'p2r-kernels'
import { repeated, stack } from './batch.js'
import type { System } from './evaluate.js'
import { cellOf } from './policy.js'
import { cellBox, saveAnnotated } from './report.js'
import { Rng } from './rng.js'
import { CELL, COLOURS, OVERVIEW, THUMBNAIL } from './scene.js'

export interface ImageAnswer {
  colour: number
  cell: number
  answer: number
}

/** Answers every question about an image file, and saves it with the boxes drawn. */
export async function answerImage(
  { device, perceiver, reasoner }: System,
  file: string,
  annotated: string,
): Promise<ImageAnswer[]> {
  return scopeAsync(async () => {
    const image = await loadImage(file, device)
    const [height, width] = image.shape as [number, number, number]
    if (Math.min(height, width) < OVERVIEW) {
      throw new Error(
        `${file} is ${width} x ${height}, and the demo reads ${OVERVIEW} x ${OVERVIEW} or more`,
      )
    }
    const count = COLOURS.length
    const colours = Array.from(COLOURS, (_, i) => i)
    const rows = repeated(count, 1)
    // Greedy, so the seed does not matter.
    const seeds = new Rng(0)

    /** The whole image at a smaller size, once a question. */
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
    const seen = perceiver.see(await reduced(OVERVIEW), colours)
    const locations = await perceiver.act(seen, rows, 0, seeds)
    const cells = Array.from(rows, (i) => cellOf(locations, i))

    const regions = cells.map((cell) => ({
      box: cellBox(cell, height, width),
      height: CELL,
      width: CELL,
    }))
    const crops = await Promise.all(cropResample({ image, regions }).map((crop) => crop.read()))
    const evidence = {
      crops: stack(
        device,
        crops.map((crop) => Uint8Array.from(crop)),
        CELL,
      ),
      thumbnails: await reduced(THUMBNAIL),
      cells,
    }
    const answers = await reasoner.act(reasoner.read(evidence, colours), rows, 0, seeds)
    await saveAnnotated(image, cells, annotated)
    return colours.map((colour, i) => ({
      colour,
      cell: cells[i] as number,
      answer: answers[i] as number,
    }))
  })
}

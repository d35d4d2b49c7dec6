import { type Grid, type RopeIndexArgs, ropeIndex } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { golden } from './golden.js'
import { expectRefusal, Random } from './harness.js'

const gridsOf = (list: Int32Array): Grid[] =>
  Array.from({ length: list.length / 3 }, (_, i) => [...list.subarray(3 * i, 3 * i + 3)] as never)
const config = { imageToken: 91, videoToken: 92, visionStartToken: 93, mergeSize: 2 }

test('has the positions of Hugging Face’s get_rope_index', () => {
  const files = golden('lm_ops')
  const read = (name: string) => files.i32(`lm_ops/rope_index/x1/${name}.bin`)
  const meta = files.json('lm_ops/rope_index/x1/meta.json')
  const { positions, deltas } = ropeIndex({
    tokens: read('input_ids'),
    cuSeqlens: read('cu_seqlens'),
    imageGrids: gridsOf(read('image_grid_thw')),
    videoGrids: gridsOf(read('video_grid_thw')),
    config: {
      imageToken: meta.image_token_id,
      videoToken: meta.video_token_id,
      visionStartToken: meta.vision_start_token_id,
      mergeSize: meta.spatial_merge_size,
    },
  })
  expect(positions).toEqual(read('position_ids'))
  expect(deltas).toEqual(read('rope_deltas'))
})

test.each(['m1_d32_gqa2_tied', 'm2_d128_mqa_untied'])('has the positions of %s', (name) => {
  const files = golden('qwen3vl')
  const read = (file: string) => {
    const path = `qwen3vl/${name}/${file}.bin`
    return files.list(path).length ? files.i32(path) : new Int32Array(0)
  }
  const { image_token_id, video_token_id } = files.json(`qwen3vl/${name}/config.json`)
  const { positions, deltas } = ropeIndex({
    tokens: read('input_ids'),
    cuSeqlens: read('cu_seqlens'),
    imageGrids: gridsOf(read('image_grid_thw')),
    videoGrids: gridsOf(read('video_grid_thw')),
    config: { imageToken: image_token_id, videoToken: video_token_id, mergeSize: 2 },
  })
  expect(positions).toEqual(read('position_ids'))
  expect(deltas).toEqual(read('rope_deltas'))
})

test('the example of three words, an image of 2 x 3 and two words', () => {
  const { positions, deltas } = ropeIndex({
    tokens: [5, 5, 93, 91, 91, 91, 91, 91, 91, 94, 5],
    cuSeqlens: [0, 11],
    imageGrids: [[1, 4, 6]],
    config,
  })
  expect([...positions]).toEqual([
    ...[0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
    ...[0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
    ...[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
  ])
  expect([...deltas]).toEqual([-3])
})

test('packed sequences have the positions that each has alone', () => {
  const random = new Random(3)
  const alone: { positions: Int32Array; delta: number; length: number }[] = []
  const tokens: number[] = []
  const cuSeqlens = [0]
  const imageGrids: Grid[] = []
  const videoGrids: Grid[] = []
  for (let s = 0; s < 12; s++) {
    const own: { tokens: number[]; images: Grid[]; videos: Grid[] } = {
      tokens: [],
      images: [],
      videos: [],
    }
    for (let part = random.int(0, 4); part > 0; part--) {
      const [h, w] = [random.int(0, 3), random.int(1, 3)]
      const pads = (id: number) => own.tokens.push(93, ...Array(h * w).fill(id), 94)
      const kind = random.int(0, 2)
      if (kind === 0) own.tokens.push(...Array(random.int(0, 5)).fill(7))
      else if (kind === 1) {
        own.images.push([1, 2 * h, 2 * w])
        pads(config.imageToken)
      } else {
        const frames = random.int(0, 3)
        own.videos.push([frames, 2 * h, 2 * w])
        for (let frame = 0; frame < frames; frame++) pads(config.videoToken)
      }
    }
    const made = ropeIndex({
      tokens: own.tokens,
      cuSeqlens: [0, own.tokens.length],
      imageGrids: own.images,
      videoGrids: own.videos,
      config,
    })
    alone.push({ positions: made.positions, delta: made.deltas[0]!, length: own.tokens.length })
    tokens.push(...own.tokens)
    cuSeqlens.push(tokens.length)
    imageGrids.push(...own.images)
    videoGrids.push(...own.videos)
  }
  const packed = ropeIndex({ tokens, cuSeqlens, imageGrids, videoGrids, config })
  expect([...packed.deltas]).toEqual(alone.map(({ delta }) => delta))
  for (let axis = 0; axis < 3; axis++) {
    const row = packed.positions.subarray(axis * tokens.length, (axis + 1) * tokens.length)
    const rows = alone.flatMap(({ positions, length }) => [
      ...positions.subarray(axis * length, (axis + 1) * length),
    ])
    expect([...row]).toEqual(rows)
  }
})

test('nothing has no positions', () => {
  const { positions, deltas } = ropeIndex({ tokens: [], cuSeqlens: [0, 0], config })
  expect(positions).toHaveLength(0)
  expect([...deltas]).toEqual([0])
})

test('refuses placeholders that do not match, and structure that breaks its rules', () => {
  const image: RopeIndexArgs = {
    tokens: [1, 91, 91, 2],
    cuSeqlens: [0, 4],
    imageGrids: [[1, 2, 4]],
    config,
  }
  expect([...ropeIndex(image).deltas]).toEqual([0])
  const refused = (change: Partial<RopeIndexArgs>, message: RegExp) =>
    expectRefusal(() => ropeIndex({ ...image, ...change }), 'ERR_VALUE', 'ropeIndex', message)
  refused(
    { imageGrids: [] },
    /tokens\[1\] is 91, the placeholder of images, but there are none left/,
  )
  refused(
    { imageGrids: [[1, 4, 4]] },
    /image 0 needs 4 placeholders \(91\) from tokens\[1\] on, got 2/,
  )
  refused({ imageGrids: [[1, 2, 2]] }, /tokens\[2\] is 91, .* none left: got 1/)
  refused({ cuSeqlens: [0, 2, 4] }, /image 0 needs 2 placeholders .* got 1/)
  refused(
    { imageGrids: [...image.imageGrids!, [1, 2, 2]] },
    /must have placeholders of 2 images, got those of 1/,
  )
  refused({ videoGrids: [[1, 2, 2]] }, /must have placeholders of 1 videos, got those of 0/)
  refused(
    { tokens: [1, 92, 92, 2], imageGrids: [], videoGrids: [[2 ** 31 - 1, 2, 2]] },
    /must have placeholders of 1 videos, got those of 0/,
  )
  refused(
    { tokens: [92, 1, 1, 1], imageGrids: [], videoGrids: [[2, 2, 4]] },
    /frame 0 of video 0 needs 2 placeholders \(92\) from tokens\[0\] on, got 1/,
  )
  refused({ imageGrids: [[1, 3, 4]] }, /imageGrids\[0\] must have h and w that mergeSize 2 divides/)
  refused({ cuSeqlens: [0, 3] }, /cuSeqlens must end at 4, the number of tokens, got 3/)
  refused({ cuSeqlens: [1, 4] }, /cuSeqlens must start at 0/)
  refused({ cuSeqlens: [0, 3, 2, 4] }, /not decrease/)
  refused({ cuSeqlens: [] }, /cuSeqlens must end at 4/)
  refused({ tokens: [1, 91, 91, -2] }, /tokens\[3\]/)
  refused({ config: { ...config, mergeSize: 0 } }, /config\.mergeSize/)
  refused({ config: { ...config, imageTokens: 1 } as never }, /did you mean 'config\.imageToken'/)
})

import { mkdtemp, readdir, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  functionPolicy,
  loadMetadata,
  loadRollouts,
  loadTensors,
  type Policy,
  PraGrpo,
  perceivePrompt,
  type Role,
  type RolloutBatch,
  reasonPrompt,
  saveImage,
  saveRollouts,
  saveTensors,
} from 'p2r-kernels'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { onEveryBackend } from './harness.js'

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'p2r-exchange-'))
})
afterAll(() => rm(folder, { recursive: true }))

onEveryBackend('batches as files', (b) => {
  let asked = 0
  const trainer = (tokens: boolean) =>
    new PraGrpo({
      perceiver: functionPolicy(({ n }) =>
        Array.from({ length: n! }, (_, i) => ({
          text: `[{"bbox_2d": [0, 0, 500, 500], "label": "${'abc '[i]!.trim()}"}]`,
          ...(tokens && { tokens: [i, i + 1], logProbs: [-0.5, -0.25 - i] }),
        })),
      ),
      reasoner: functionPolicy(() => {
        if (asked++ % 3 === 2) throw new Error('down')
        return `<answer>${'AB'[asked % 2]}</answer>`
      }),
      device: b.device,
      groupSize: 4,
      concurrency: 1,
      schedule: { perceiver: 2, reasoner: 1 },
    })
  const samples = () => [
    {
      image: b.device.zeros([20, 30, 3], 'u8'),
      question: 'q',
      answerForm: 'mca' as const,
      truth: 'A',
    },
  ]

  test('a saved batch is stepped in another process', async () => {
    const pra = trainer(true)
    using batch = await pra.rollout(samples())
    const path = join(folder, 'batch.safetensors')
    await saveRollouts(path, batch)
    using loaded = await loadRollouts(path, b.device)
    for (const name of [
      'role',
      'groups',
      'tokens',
      'cuSeqlens',
      'metrics',
      'temperature',
      'oldLogProbsTemperature',
    ] as const)
      expect(loaded[name], name).toEqual(batch[name])
    for (const name of ['rewards', 'advantages', 'oldLogProbs'] as const)
      expect(await loaded[name]!.read()).toEqual(await batch[name]!.read())
    const plain = ({ items }: RolloutBatch) =>
      items.map(({ error, evidence: _, request, ...item }) => ({
        ...item,
        error: error?.message,
        prompt: request?.prompt,
      }))
    expect(plain(loaded)).toEqual(plain(batch))
    expect(loaded.items.filter(({ error }) => error).length).toBe(1)
    const logProbs = b.device.zeros([loaded.tokens!.length])
    using there = pra.step(loaded, { logProbs })
    using here = trainer(true).step(batch, { logProbs })
    expect(await there.dLogProbs!.read()).toEqual(await here.dLogProbs!.read())
    // As a trainer in another language sees it.
    const tensors = await loadTensors(path, b.device)
    expect(Object.keys(tensors).sort()).toEqual([
      'advantages',
      'cu_seqlens',
      'groups',
      'old_log_probs',
      'rewards',
      'tokens',
    ])
    const { items } = await loadMetadata(path)
    expect(JSON.parse(items!)[0].boxes).toEqual([{ bbox2d: [0, 0, 500, 500], label: 'a' }])
  })

  /** Two samples' rollouts of a role, and what its policy was shown. */
  const rolled = async (role: Role) => {
    const shown: { prompt: string; system: string; images: Uint8Array[]; shapes: unknown[] }[] = []
    const seeing: Policy = {
      async generate({ system, prompt, images, n = 1, role: of }) {
        const text = of === 'perceiver' ? sign : '<answer>A</answer>'
        if (of === role)
          shown.push({
            system,
            prompt,
            images: await Promise.all(images.map((image) => image.read())),
            shapes: images.map(({ shape }) => shape),
          })
        return Array.from({ length: n }, () => ({ text, tokens: [1], promptTokens: [7, 8, 9] }))
      },
    }
    const pra = new PraGrpo({
      perceiver: seeing,
      reasoner: seeing,
      device: b.device,
      groupSize: 2,
      concurrency: 1,
      evidence: { maxPixels: 64 * 64 },
      schedule: { perceiver: +(role === 'perceiver'), reasoner: +(role === 'reasoner') },
    })
    const pixels = Uint8Array.from({ length: 80 * 96 * 3 }, (_, i) => (i * 7) % 256)
    const image = b.device.tensor(pixels, [80, 96, 3])
    const samples = ['one', 'two'].map((question) => ({
      image,
      question,
      answerForm: 'mca' as const,
      truth: 'A',
    }))
    return { batch: await pra.rollout(samples), shown, image }
  }
  const sign = '[{"bbox_2d": [100, 100, 500, 500], "label": "sign"}]'

  test.each(['perceiver', 'reasoner'] as const)(
    'items carry what the %s was asked, in files too',
    async (role) => {
      const { batch: made, shown, image } = await rolled(role)
      using batch = made
      const live = b.device.memory().liveBytes
      const folder = await mkdtemp(join(tmpdir(), 'p2r-requests-'))
      onTestFinished(() => rm(folder, { recursive: true }))
      const path = join(folder, `${role}.safetensors`)
      await saveRollouts(path, batch, { images: 'files' })
      expect(b.device.memory().liveBytes).toBeLessThanOrEqual(live)
      const requests = batch.items.map(({ request }) => request!)
      expect(requests[0]).toBe(requests[1])
      expect(requests[1]).not.toBe(requests[2])
      const { system, prompt } =
        role === 'perceiver'
          ? perceivePrompt({ question: 'two' })
          : reasonPrompt({ question: 'two', answerForm: 'mca', hasEvidence: true })
      expect({ ...requests[2] }).toEqual({ system, prompt, promptTokens: [7, 8, 9] })
      expect(requests[2]!.images.length).toBe(role === 'perceiver' ? 1 : 2)
      for (const [i, request] of [requests[0]!, requests[2]!].entries()) {
        expect(request.prompt).toBe(shown[i]!.prompt)
        expect(request.images.map(({ shape }) => shape)).toEqual(shown[i]!.shapes)
        for (const [j, seen] of request.images.entries())
          expect(await seen.read()).toEqual(shown[i]!.images[j])
      }

      // Both samples have one image, so there is one file of each.
      const names = await readdir(`${path}.images`)
      expect(names.length).toBe(role === 'perceiver' ? 1 : 2)
      using loaded = await loadRollouts(path, b.device)
      const again = loaded.items[2]!.request!
      expect(loaded.items[3]!.request).toBe(again)
      expect(again).toMatchObject({ system, prompt, promptTokens: [7, 8, 9] })
      expect(loaded.items[2]!.completion).toEqual(batch.items[2]!.completion)
      for (const [j, seen] of again.images.entries())
        expect(await seen.read()).toEqual(shown[1]!.images[j])
      const [first] = again.stored!
      expect(first).toMatchObject({ height: again.images[0]!.shape[0], file: expect.any(String) })

      // Hashes alone: of the same pixels, but there are no images to load.
      const plain = join(folder, `${role}-hashes.safetensors`)
      await saveRollouts(plain, batch)
      for (const [file, options] of [
        [plain, {}],
        [path, { images: false }],
      ] as const) {
        using bare = await loadRollouts(file, b.device, options)
        expect(bare.items[0]!.request!.stored![0]).toMatchObject({ sha256: first!.sha256 })
        expect(() => bare.items[0]!.request!.images).toThrow(/images 'files'/)
        await saveRollouts(join(folder, 'again.safetensors'), bare)
        await expect(
          saveRollouts(join(folder, 'again.safetensors'), bare, { images: 'files' }),
        ).rejects.toMatchObject({ code: 'ERR_VALUE' })
      }

      // Another picture under the file's name, and none.
      const stored = join(folder, first!.file!)
      await saveImage(b.device.zeros([4, 4, 3], 'u8'), stored)
      await expect(loadRollouts(path, b.device)).rejects.toMatchObject({ code: 'ERR_FORMAT' })
      await rename(stored, `${stored}.away`)
      await expect(loadRollouts(path, b.device)).rejects.toMatchObject({ code: 'ERR_IO' })
      batch.dispose()
      expect(() => requests[0]!.images).toThrow(expect.objectContaining({ code: 'ERR_DISPOSED' }))
      image.dispose()
    },
  )

  test('a batch without tokens', async () => {
    using batch = await trainer(false).rollout(samples())
    const path = join(folder, 'plain.safetensors')
    await saveRollouts(path, batch)
    using loaded = await loadRollouts(path, b.device)
    expect(loaded.tokens).toBeUndefined()
    expect(await loaded.rewards.read()).toEqual(await batch.rewards.read())
  })

  test('nothing leaks, and other files are refused', async () => {
    const before = b.device.memory().liveBytes
    const path = join(folder, 'other.safetensors')
    const rewards = b.device.zeros([2])
    const good = { format: 'p2r-rollouts', version: '1', role: 'reasoner', items: '[]' }
    for (const header of [
      {},
      { ...good, version: '2' },
      { ...good, role: 'cook' },
      { ...good, items: '{' },
      { ...good, sampling: '{"temperature": "hot"}' },
      { ...good, requests: '{}' },
      { ...good, requests: '[{"system": "", "prompt": ""}]' },
      { ...good, requests: '[{"system": "", "prompt": "", "images": [{}]}]' },
      {
        ...good,
        requests: '[{"system": "", "prompt": "", "images": [{"sha256": "", "file": "../a.png"}]}]',
      },
      good,
    ] as Record<string, string>[]) {
      await saveTensors(path, { rewards }, header)
      await expect(loadRollouts(path, b.device)).rejects.toMatchObject({
        code: 'ERR_FORMAT',
        op: 'loadRollouts',
      })
    }
    await expect(loadRollouts(join(folder, 'none'), b.device)).rejects.toMatchObject({
      code: 'ERR_IO',
    })
    rewards.dispose()
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
  })
})

test('metadata, and files without it', async () => {
  const path = join(folder, 'm.safetensors')
  await saveTensors(path, {})
  expect(await loadMetadata(path)).toEqual({})
  await saveTensors(path, {}, { a: 'b' })
  expect(await loadMetadata(path)).toEqual({ a: 'b' })
  await expect(loadMetadata(join(folder, 'none'))).rejects.toMatchObject({ code: 'ERR_IO' })
})

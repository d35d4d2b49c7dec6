import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  functionPolicy,
  loadMetadata,
  loadRollouts,
  loadTensors,
  PraGrpo,
  saveRollouts,
  saveTensors,
} from 'p2r-kernels'
import { afterAll, beforeAll, expect, test } from 'vitest'
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
    expect(loaded.items.map(({ error, ...item }) => ({ ...item, error: error?.message }))).toEqual(
      batch.items.map(({ error, evidence: _, ...item }) => ({ ...item, error: error?.message })),
    )
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

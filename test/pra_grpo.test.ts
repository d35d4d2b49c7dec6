import {
  alternatingSettings,
  type Completion,
  functionPolicy,
  grpoStep,
  informativeGroups,
  type Policy,
  PraGrpo,
  type PraGrpoOptions,
  paperSettings,
  rolloutCorrection,
  type Sample,
  type Tensor,
  type TrainedModel,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import { expectRefusal, onEveryBackend, Random } from './harness.js'

const boxes = (label: string) => `[{"bbox_2d": [0, 0, 250, 500], "label": "${label}"}]`
const eye = (n: number) => Float32Array.from({ length: n * n }, (_, i) => +(i % (n + 1) === 0))
const overlapping = `[${['a', 'b'].map((l) => boxes(l).slice(1, -1))}]`

onEveryBackend('PraGrpo', (b) => {
  const image = () => b.device.zeros([40, 50, 3], 'u8')
  const sample = (question: string, truth = 'A'): Sample => ({
    image: image(),
    question,
    answerForm: 'mca',
    truth,
  })
  /** Says these texts for n, each token a character; the questions it was asked are kept. */
  const sampler = (f: (prompt: string, i: number, n: number) => string) => {
    const asked: { prompt: string; n: number; temperature?: number; tokens?: boolean }[] = []
    const policy: Policy = {
      async generate({ prompt, n = 1, images, ...rest }) {
        asked.push({ prompt, n, ...rest })
        for (const one of images) await one.read()
        return Array.from({ length: n }, (_, i) => {
          const text = f(prompt, i, n)
          const tokens = [...text].map((c) => c.charCodeAt(0) % 32)
          return { text, tokens, logProbs: tokens.map((t) => -(t + 1) / 64) }
        })
      },
    }
    return { policy, asked }
  }
  const trainer = (options: Partial<PraGrpoOptions>) =>
    new PraGrpo({
      perceiver: functionPolicy(() => boxes('sign')),
      reasoner: functionPolicy(() => '<answer>A</answer>'),
      device: b.device,
      groupSize: 4,
      ...options,
    })
  const refLogProbs = (t: Tensor) => b.device.tensor(new Float32Array(t.size).fill(-0.3), [t.size])

  test('the perceiver’s phase: rewards from the frozen reasoner, which faults do not reach', async () => {
    // A box that is labelled 'good' leads to the right answer.
    const perceiver = sampler((_, i) => [boxes('good'), boxes('bad'), overlapping, boxes('')][i]!)
    let shown = 0
    const reasoner = sampler(() => `<answer>${'AB'[shown++ % 2]}</answer>`)
    const pra = trainer({ perceiver: perceiver.policy, reasoner: reasoner.policy })
    expect(pra.role).toBe('perceiver')
    using batch = await pra.rollout([sample('one'), sample('two')])
    expect(batch.role).toBe('perceiver')
    expect(batch.items.map(({ sample }) => sample)).toEqual([0, 0, 0, 0, 1, 1, 1, 1])
    expect(batch.items.map(({ fault }) => fault ?? null).slice(0, 4)).toEqual([
      null,
      null,
      'overlap',
      'label',
    ])
    expect([...(await batch.rewards.read())].reduce((s, r) => s + r, 0)).toBe(2)
    expect(reasoner.asked.length).toBe(4)
    expect(perceiver.asked.map(({ n, temperature, tokens }) => [n, temperature, tokens])).toEqual([
      [4, 1, true],
      [4, 1, true],
    ])
    expect(reasoner.asked[0]).toMatchObject({ n: 1, temperature: 0, tokens: false })
    expect([...batch.groups]).toEqual([0, 0, 0, 0, 2, 2, 2, 2])
    expect(batch.metrics).toEqual({
      rewardMean: 0.25,
      groupsWithoutSignal: 0,
      faults: { overlap: 2, label: 2 },
      errors: 0,
      droppedBoxes: 0,
      truncated: 0,
      outOfTurns: 0,
      items: 8,
    })
    expect(batch.items[0]).toMatchObject({ answer: 'A', counterpart: '<answer>A</answer>' })
  })

  test('the reasoner’s phase: one greedy perception, answered by the group', async () => {
    const perceiver = sampler(() => boxes('sign'))
    const reasoner = sampler((_, i) => `<answer>${'ABAB'[i]}</answer>`)
    const pra = trainer({
      perceiver: perceiver.policy,
      reasoner: reasoner.policy,
      schedule: { perceiver: 0, reasoner: 1 },
    })
    using batch = await pra.rollout([sample('one'), sample('two', 'C')])
    expect(perceiver.asked.map(({ n, temperature, tokens }) => [n, temperature, tokens])).toEqual([
      [1, 0, false],
      [1, 0, false],
    ])
    expect(reasoner.asked.map(({ n }) => n)).toEqual([4, 4])
    expect(batch.items.map(({ reward }) => reward)).toEqual([1, 0, 1, 0, 0, 0, 0, 0])
    expect([...batch.groups]).toEqual([1, 1, 1, 1, 3, 3, 3, 3])
    expect(batch.metrics.groupsWithoutSignal).toBe(0.5)
    // A silent group teaches nothing, and the device agrees on which that is.
    const teaches = informativeGroups({ rewards: batch.rewards, groups: batch.groups })
    expect([...(await teaches.read())]).toEqual([1, 1, 1, 1, 0, 0, 0, 0])
    expect([...(await batch.advantages.read())].slice(4)).toEqual([0, 0, 0, 0])
    expect(batch.items[0]).toMatchObject({ counterpart: boxes('sign'), answer: 'A' })
  })

  test('a step is grpoStep on the batch’s tokens, for every kind of model', async () => {
    const random = new Random(3)
    const perceiver = sampler((_, i) => boxes('abcd'.slice(0, i + 1)))
    let right = 0
    const reasoner = functionPolicy(() => `<answer>${'AB'[right++ % 2]}</answer>`)
    const loss = { klCoef: 0.2, clipHigh: 0.3 }
    const pra = trainer({ perceiver: perceiver.policy, reasoner, loss, estimator: 'opo' })
    const [V, C] = [40, 6]
    for (const kind of ['logProbs', 'logits', 'hidden'] as const) {
      while (pra.role !== 'perceiver') {
        const other = await trainer({
          schedule: { perceiver: 0, reasoner: 1 },
          reasoner: sampler(() => '<answer>A</answer>').policy,
        }).rollout([sample('x')])
        pra.step(other, { logProbs: other.oldLogProbs! }).dispose()
      }
      using batch = await pra.rollout([sample('one'), sample('two')])
      const T = batch.tokens!.length
      expect(batch.cuSeqlens!.at(-1)).toBe(T)
      expect(T).toBe(batch.items.reduce((s, i) => s + i.completion.text.length, 0))
      expect([...(await batch.oldLogProbs!.read())]).toEqual(
        [...batch.tokens!].map((t) => -(t + 1) / 64),
      )
      const targets = b.device.tensor(batch.tokens!, [T])
      const model = {
        logProbs: { logProbs: b.device.tensor(random.normals(T, 0.1), [T]) },
        logits: { logits: b.device.tensor(random.normals(T * V), [T, V]), targets },
        hidden: {
          hidden: b.device.tensor(random.normals(T * C), [T, C]),
          weight: b.device.tensor(random.normals(V * C), [V, C]),
          targets,
        },
      }[kind]
      const ref = refLogProbs(batch.oldLogProbs!)
      const { rewards, groups, cuSeqlens, oldLogProbs } = batch
      using expected = grpoStep({
        ...model,
        ...loss,
        rewards,
        groups,
        cuSeqlens: cuSeqlens!,
        oldLogProbs: oldLogProbs!,
        refLogProbs: ref,
        estimator: 'opo',
      })
      const before = pra.steps
      const step = pra.step(batch, { ...model, refLogProbs: ref })
      for (const name of ['loss', 'dLogProbs', 'dLogits', 'dHidden', 'dWeight'] as const) {
        expect(!!step[name], name).toBe(!!expected[name])
        if (step[name]) expect(await step[name].read()).toEqual(await expected[name]!.read())
      }
      expect(await batch.advantages.read()).toEqual(await expected.advantages.read())
      step.dispose()
      expect((await pra.metrics()).perceiver).toEqual({
        ...(await expected.metrics()),
        ...batch.metrics,
        step: before,
        ratiosTo: 'server',
        sampledEntropy: expect.closeTo(
          -(await expected.logProbs.toFloat32()).reduce((s, x) => s + x, 0) / T,
          5,
        ),
      })
      expectRefusal(() => pra.step(batch, model), 'ERR_VALUE', 'step', /turn/)
    }
    expect(Object.keys(await pra.metrics())).toEqual(['perceiver', 'reasoner'])
  })

  test('old log-probs of trainer and server are corrected', async () => {
    let n = 0
    const perceiver = sampler(() => boxes('x')).policy
    const reasoner = functionPolicy(() => `<answer>${'AB'[n++ % 2]}</answer>`)
    const schedule = { perceiver: 6, reasoner: 1 }
    // The first sequence's log-probs are far apart: it leaves the loss and its group.
    const reject = [{ measure: 'k2', over: 'mean', high: 1 }] as const
    const correction = { level: 'token', high: 1.5, reject } as const
    const pra = trainer({ perceiver, reasoner, schedule, correction })
    const metricsOf = async (of = pra) => (await of.metrics()).perceiver!
    using batch = await pra.rollout([sample('q')])
    const { rewards, groups } = batch
    const cuSeqlens = batch.cuSeqlens!
    const rolloutLogProbs = batch.oldLogProbs!
    const served = await rolloutLogProbs.read()
    const apart = served.map((x, t) => x + (t < cuSeqlens[1]! ? 4 : 0.1 * (t % 7)))
    const oldLogProbs = b.device.tensor(apart, [apart.length])
    const engines = { logProbs: oldLogProbs, rolloutLogProbs, cuSeqlens }
    using corrected = rolloutCorrection({ ...correction, ...engines })
    const { importanceWeights, mask } = corrected
    const model = { logProbs: rolloutLogProbs, oldLogProbs }
    const given = { ...model, rewards, groups, cuSeqlens }
    using expected = grpoStep({ ...given, importanceWeights, mask, skipEmpty: true })
    using step = pra.step(batch, model)
    expect(await step.dLogProbs.read()).toEqual(await expected.dLogProbs.read())
    expect((await step.advantages.read())[0]).toBe(0)
    const metrics = await metricsOf()
    expect(metrics.ratiosTo).toBe('trainer')
    expect(metrics.correction).toEqual(await corrected.metrics())
    expect(metrics.correction!.rejectedShare).toBeCloseTo(cuSeqlens[1]! / apart.length, 6)

    // Measured only.
    const uncorrected = trainer({ perceiver, reasoner, schedule, correction: false })
    using plain = grpoStep(given)
    using same = uncorrected.step(batch, model)
    expect(await same.dLogProbs.read()).toEqual(await plain.dLogProbs.read())
    expect((await metricsOf(uncorrected)).correction!.k3).toBe(metrics.correction!.k3)

    // verl's weights unless others are given; DeepSeek's rule takes the batch's advantages.
    for (const [options, how] of [
      [{}, {}],
      [{ correction: { maxDivergence: 0 } }, { maxDivergence: 0, advantages: batch.advantages }],
    ] as const) {
      const other = trainer({ perceiver, reasoner, schedule, ...options })
      using pair = rolloutCorrection({ ...how, ...engines })
      const by = { importanceWeights: pair.importanceWeights, mask: pair.mask }
      using one = grpoStep({ ...given, ...by, skipEmpty: true })
      using two = other.step(batch, model)
      expect(await two.dLogProbs.read()).toEqual(await one.dLogProbs.read())
    }

    // The server's are taken as the old ones where the trainer gives none.
    const bypassing = trainer({ perceiver, reasoner, schedule })
    bypassing.step(batch, { logProbs: oldLogProbs }).dispose()
    expect((await metricsOf(bypassing)).ratiosTo).toBe('server')
    expect(await metricsOf(bypassing)).not.toHaveProperty('correction')
    const { oldLogProbs: _, ...without } = batch
    const current = trainer({ perceiver, reasoner, schedule })
    current
      .step({ ...without, dispose() {}, [Symbol.dispose]() {} }, { logProbs: oldLogProbs })
      .dispose()
    expect((await metricsOf(current)).ratiosTo).toBe('current')
  })

  test('completions that were cut off, long ones, and KL in the reward', async () => {
    let n = 0
    const reasoner = functionPolicy(() => `<answer>${'AB'[n++ % 2]}</answer>`)
    const tokens = [3, 8, 10, 4]
    const perceiver: Policy = {
      generate: ({ n: count = 1 }) =>
        Promise.resolve(
          Array.from({ length: count }, (_, i) => ({
            text: boxes('x'),
            tokens: Array(tokens[i]!).fill(1),
            logProbs: Array(tokens[i]!).fill(-0.5),
            finishReason: i === 2 ? 'length' : 'stop',
          })),
        ),
    }
    const common = { perceiver, reasoner, maxTokens: { perceiver: 10, reasoner: 20 } }
    const pra = trainer({ ...common, truncated: 'mask', klIn: 'reward', overlong: { buffer: 4 } })
    using batch = await pra.rollout([sample('q')])
    expect(batch.metrics.truncated).toBe(1)
    expect([...(await batch.rewards.read())]).toEqual([1, -0.5, 0, 0])
    const { rewards, groups } = batch
    const [cuSeqlens, oldLogProbs] = [batch.cuSeqlens!, batch.oldLogProbs!]
    const T = oldLogProbs.size
    const bits = Uint8Array.from({ length: T }, (_, t) => +(t < 11 || t >= 21))
    const mask = b.device.tensor(bits, [T])
    const model = { logProbs: oldLogProbs, refLogProbs: refLogProbs(oldLogProbs) }
    const given = { rewards, groups, cuSeqlens, mask, oldLogProbs }
    using expected = grpoStep({ ...given, ...model, klIn: 'reward' })
    using step = pra.step(batch, model)
    expect(await step.dLogProbs.read()).toEqual(await expected.dLogProbs.read())
    const advantages = await step.advantages.read()
    expect(advantages).toEqual(await expected.advantages.read())
    // Its reward stays in the group's baseline, and none of its tokens in the loss.
    expect(advantages[2]).not.toBe(0)
    expect((await pra.metrics()).perceiver!.tokens).toBe(15)
    expect((await step.dLogProbs.read()).subarray(11, 21).every((x) => x === 0)).toBe(true)

    // With weights between trainer and server too.
    const both = trainer({ ...common, truncated: 'mask' })
    const apart = b.device.tensor(new Float32Array(T).fill(-0.4), [T])
    const engines = { logProbs: apart, rolloutLogProbs: oldLogProbs, cuSeqlens, mask }
    using corrected = rolloutCorrection(engines)
    const { importanceWeights } = corrected
    using one = grpoStep({ ...given, ...model, oldLogProbs: apart, importanceWeights })
    using two = both.step(batch, { ...model, oldLogProbs: apart })
    expect(await two.dLogProbs.read()).toEqual(await one.dLogProbs.read())

    // Without tokens there is no length.
    const wordless = functionPolicy(() => boxes('x'))
    using none = await trainer({ ...common, perceiver: wordless, overlong: { buffer: 4 } }).rollout(
      [sample('q')],
    )
    expect(none.metrics.errors).toBe(4)
    expect(none.items[0]!.error).toMatchObject({ code: 'ERR_POLICY' })
    const refuses = (extra: object, message: RegExp) =>
      expectRefusal(
        () => trainer({ ...common, ...extra } as never),
        'ERR_VALUE',
        'PraGrpo',
        message,
      )
    refuses({ truncated: 'drop' }, /truncated/)
    refuses({ klIn: 'both' }, /klIn/)
    refuses({ overlong: { buffer: 11 } }, /overlong.buffer/)
    refuses({ overlong: { buffer: 4, factor: -1 } }, /overlong.factor/)
    refuses({ overlong: { bufer: 4 } }, /did you mean 'overlong.buffer'/)
    refuses({ correction: { hi: 4 } }, /correction/)
  })

  test('a batch is stepped once', async () => {
    const perceiver = sampler(() => boxes('x')).policy
    const pra = trainer({ perceiver, schedule: { perceiver: 2, reasoner: 1 } })
    using batch = await pra.rollout([sample('q')])
    pra.step(batch, { logProbs: batch.oldLogProbs! }).dispose()
    expect(pra.role).toBe('perceiver')
    expectRefusal(
      () => pra.step(batch, { logProbs: batch.oldLogProbs! }),
      'ERR_VALUE',
      'step',
      /stepped already/,
    )
  })

  test('a wrong model is blamed by its own names, and the batch can still be stepped', async () => {
    const perceiver = sampler(() => boxes('x')).policy
    const pra = trainer({ perceiver })
    using batch = await pra.rollout([sample('q')])
    const T = batch.tokens!.length
    const good = batch.oldLogProbs!
    const targets = b.device.tensor(batch.tokens!, [T])
    const wrong: [model: object, code: string, message: string][] = [
      [
        { logProbs: b.device.zeros([T + 1]) },
        'ERR_SHAPE',
        `logProbs must be [${T}], because cuSeqlens ends at ${T} tokens, got [${T + 1}]`,
      ],
      [{ logProbs: b.device.zeros([T], 'f16') }, 'ERR_DTYPE', 'logProbs must be'],
      [
        { logits: b.device.zeros([T - 1, 9]), targets },
        'ERR_SHAPE',
        `logits must be [${T}, V], because`,
      ],
      [
        { logits: b.device.zeros([T, 9]), targets: targets.slice(1) },
        'ERR_SHAPE',
        `targets must be [${T}], because`,
      ],
      [
        { hidden: b.device.zeros([2, 4]), weight: b.device.zeros([9, 4]), targets },
        'ERR_SHAPE',
        `hidden must be [${T}, C], because`,
      ],
      [{ hidden: b.device.zeros([T, 4]), targets }, 'ERR_VALUE', 'weight must be a Tensor'],
      [{ logProbs: good, refLogProbs: good.slice(1) }, 'ERR_SHAPE', 'refLogProbs'],
      [{ logProbs: good, oldLogProbs: good.slice(1) }, 'ERR_SHAPE', 'oldLogProbs'],
      [{}, 'ERR_VALUE', 'got none of them'],
      [
        { logProbs: good, logits: b.device.zeros([T, 9]), targets },
        'ERR_VALUE',
        'got logProbs and logits',
      ],
      [
        { logProbs: good, temperature: 2 },
        'ERR_VALUE',
        "the model's temperature must be 1, at which the tokens were sampled, got 2",
      ],
      [
        { logits: b.device.zeros([T, 9]), targets, bias: good },
        'ERR_VALUE',
        'bias does not belong to a model of logits',
      ],
      [
        { logProb: good },
        'ERR_VALUE',
        "unknown option 'model.logProb'; did you mean 'model.logProbs'?",
      ],
      [good, 'ERR_VALUE', 'model must be an object, got a Tensor'],
    ]
    for (const [model, code, message] of wrong) {
      expect(() => pra.step(batch, model as never)).toThrow(
        expect.objectContaining({ code, op: 'step', message: expect.stringContaining(message) }),
      )
      expect(pra.role).toBe('perceiver')
    }
    // Undefined is as if left out.
    pra.step(batch, { logProbs: good, logits: undefined } as never).dispose()
    expect(pra.role).toBe('reasoner')
  })

  test('schedules: phases and rounds of the recipes; a continued run', async () => {
    const policies = {
      perceiver: sampler(() => boxes('x')).policy,
      reasoner: sampler(() => '<answer>A</answer>').policy,
    }
    const turns = async (pra: PraGrpo, most: number) => {
      let all = ''
      while (all.length < most && !pra.finished) {
        all += pra.role[0]
        using batch = await pra.rollout([sample('q')])
        pra.step(batch, { logProbs: batch.oldLogProbs! }).dispose()
      }
      return all
    }
    const schedule = { perceiver: 2, reasoner: 1 }
    expect(await turns(trainer({ ...policies, schedule }), 7)).toBe('pprpprp')
    expect(await turns(trainer({ ...policies, schedule, rounds: 2 }), 99)).toBe('pprppr')
    expect(await turns(trainer({ ...policies, schedule, step: 2 }), 3)).toBe('rpp')
    expect(await turns(trainer({ ...policies, ...alternatingSettings() }), 4)).toBe('prpr')
    expect(
      await turns(trainer({ ...policies, ...paperSettings({ samples: 130, batch: 64 }) }), 99),
    ).toBe('pprr')
    expect(paperSettings()).toMatchObject({
      groupSize: 8,
      schedule: { perceiver: 156, reasoner: 156 },
      rounds: 1,
    })
    const over = trainer({ ...policies, schedule, rounds: 1, step: 3 })
    await expect(over.rollout([])).rejects.toMatchObject({ code: 'ERR_VALUE' })
  })

  test('single failures are reported, and the batch is made without them', async () => {
    const perceiver = sampler((prompt) => {
      if (/broken/.test(prompt)) throw new Error('perceiver down')
      return boxes('x')
    })
    let n = 0
    const reasoner = functionPolicy(() => {
      if (n++ % 4 === 0) throw new Error('reasoner down')
      return `<answer>${'AB'[n % 2]}</answer>`
    })
    const pra = trainer({ perceiver: perceiver.policy, reasoner, concurrency: 1 })
    using batch = await pra.rollout([sample('fine'), sample('broken'), sample('also fine')])
    expect(batch.items.length).toBe(12)
    const failed = batch.items.filter(({ error }) => error)
    expect(failed.map(({ error }) => error!.message)).toEqual([
      expect.stringContaining('reasoner down'),
      ...Array(4).fill(expect.stringContaining('perceiver down')),
      expect.stringContaining('reasoner down'),
    ])
    for (const { error, reward } of failed) {
      expect(error).toMatchObject({ code: 'ERR_POLICY' })
      expect(reward).toBeNaN()
    }
    expect([...batch.groups]).toEqual([0, 0, 0, 4, 4, 4])
    expect(batch.metrics).toMatchObject({ errors: 6, items: 12 })
    const step = pra.step(batch, { logProbs: batch.oldLogProbs! })
    expect((await step.metrics()).tokens).toBe(batch.tokens!.length)
    step.dispose()
  })

  test('everything fails: an empty batch with its errors', async () => {
    const down = functionPolicy(() => {
      throw new Error('down')
    })
    using batch = await trainer({ perceiver: down }).rollout([sample('q')])
    expect(batch.metrics).toMatchObject({ errors: 4, items: 4, rewardMean: 0 })
    expect(batch.rewards.shape).toEqual([0])
  })

  test('free form by a verifier, whose failure is one rollout’s', async () => {
    let n = 0
    const pra = trainer({
      perceiver: sampler(() => boxes('x')).policy,
      verifier: async ({ answer, truth, question }) => {
        if (n++ === 0) throw new Error('no verdict')
        return answer === 'A' && truth === 'an A' && question === 'q'
      },
    })
    const free = { ...sample('q', 'an A'), answerForm: 'free_form' as const }
    using batch = await pra.rollout([free])
    expect(batch.items.map(({ reward }) => reward)).toEqual([NaN, 1, 1, 1])
    expect(batch.items[0]!.error!.message).toBe('no verdict')
    await expect(trainer({}).rollout([free])).rejects.toMatchObject({
      code: 'ERR_VALUE',
      message: expect.stringMatching(/verifier/),
    })
  })

  test('refused rollouts are errors, not zeros', async () => {
    const perceiver: Policy = {
      generate: async () => [
        { text: boxes('x'), tokens: [1] },
        { text: '', refusal: 'no' },
        { text: boxes('x'), tokens: [2, 3] },
        { text: boxes('x'), tokens: [4] },
      ],
    }
    using batch = await trainer({ perceiver }).rollout([sample('q')])
    expect(batch.items[1]!.error!.message).toMatch(/refused to answer: no/)
    expect([...batch.tokens!]).toEqual([1, 2, 3, 4])
    expect([...batch.cuSeqlens!]).toEqual([0, 1, 3, 4])
    expect(batch.oldLogProbs).toBeUndefined()
  })

  test('the loss is of the rollouts’ temperature', async () => {
    const temperature = 0.6
    const logits = b.device.tensor([2, 1, 0, -1, 2, 1, 0, -1], [2, 4])
    const targets = b.device.tensor(new Int32Array([1, 1]), [2])
    // Token 1's log-probability at 0.6.
    const own = -1 / 0.6 - Math.log([0, -1, -2, -3].reduce((s, x) => s + Math.exp(x / 0.6), 0))
    const sampled: Policy = {
      generate: async ({ n = 1 }) =>
        Array.from({ length: n }, () => ({ text: boxes('x'), tokens: [1], logProbs: [own] })),
    }
    const start = (options: Partial<PraGrpoOptions> = {}) =>
      trainer({ perceiver: sampled, groupSize: 2, temperature, ...options })
    const oldLogProbs = b.device.tensor([own, own], [2])
    const pra = start()
    using batch = await pra.rollout([sample('q')])
    expect(batch).toMatchObject({ temperature, oldLogProbsTemperature: 1 })
    const hidden = { hidden: logits, weight: b.device.tensor(eye(4), [4, 4]), targets }
    const refused: [model: object, message: RegExp][] = [
      [
        { logits, targets },
        /log-probabilities are of temperature 1, its tokens were sampled at 0.6/,
      ],
      [{ logits, targets, oldLogProbs, temperature: 1 }, /temperature must be 0.6.* got 1/],
      [{ ...hidden, oldLogProbs, temperature: 2 }, /temperature must be 0.6.* got 2/],
      [{ logProbs: oldLogProbs, oldLogProbs }, /temperature must be 0.6.* got 1/],
    ]
    for (const [model, message] of refused)
      expectRefusal(() => pra.step(batch, model as never), 'ERR_VALUE', 'step', message)
    for (const model of [
      { logits, targets },
      { logits, targets, temperature },
      hidden,
      { logProbs: oldLogProbs, temperature },
    ]) {
      using step = start().step(batch, { ...model, oldLogProbs } as TrainedModel)
      expect((await step.metrics()).ratioMean).toBeCloseTo(1, 4)
    }
    // Its own temperature counts, not the trainer's that steps it.
    using elsewhere = trainer({ groupSize: 2 }).step(batch, { logits, targets, oldLogProbs })
    expect((await elsewhere.metrics()).ratioMean).toBeCloseTo(1, 4)

    const processed = start({ logProbsMode: 'processed' })
    using declared = await processed.rollout([sample('q')])
    using step = processed.step(declared, { logits, targets })
    expect((await step.metrics()).ratioMean).toBeCloseTo(1, 4)
    const greedy = start({ temperature: 0, logProbsMode: 'processed' })
    using certain = await greedy.rollout([sample('q')])
    expectRefusal(
      () => greedy.step(certain, { logits, targets }),
      'ERR_VALUE',
      'step',
      /sampled at temperature 0/,
    )
  })

  test('strict rules read the boxes after the thought, and boxes without a crop are counted', async () => {
    const box = boxes('sign')
    const outside = '[{"bbox_2d": [1500, 1500, 1900, 1900], "label": "pixels"}]'
    const thinks = `Perhaps ${box}</think>${box}`
    const quoted = box.replaceAll('"', "'")
    const perceiver = sampler((_, i) => [thinks, outside, outside, quoted][i]!)
    const rolled = (options: Partial<PraGrpoOptions>) =>
      trainer({ perceiver: perceiver.policy, ...options }).rollout([sample('q')])
    using strict = await rolled({ rules: 'strict' })
    expect(strict.items.map(({ evidence }) => evidence!.boxes.length)).toEqual([1, 1, 1, 1])
    expect(strict.metrics).toMatchObject({ droppedBoxes: 2, faults: { overlap: 0 } })
    using reference = await rolled({})
    expect(reference.items.map(({ evidence }) => evidence!.boxes.length)).toEqual([2, 1, 1, 0])
    expect(reference.metrics).toMatchObject({ droppedBoxes: 2, faults: { overlap: 1 } })
    using seen = await rolled({ schedule: { perceiver: 0, reasoner: 1 } })
    // The group shares the one perception, the first of the sampler's.
    expect(seen.metrics.droppedBoxes).toBe(0)
    const other = sampler(() => outside)
    using missed = await rolled({
      perceiver: other.policy,
      schedule: { perceiver: 0, reasoner: 1 },
    })
    expect(missed.metrics).toMatchObject({ droppedBoxes: 1, items: 4 })
  })

  test('a rollout that lacks what the others have is an error', async () => {
    const all = { text: boxes('x'), tokens: [1, 2], logProbs: [-1, -2] }
    const perceiver = (...completions: Completion[]): Policy => ({
      generate: async () => completions,
    })
    const rolled = (...completions: Completion[]) =>
      trainer({ perceiver: perceiver(...completions) }).rollout([sample('q')])
    const { logProbs: _, ...without } = all
    const cut = { ...all, finishReason: 'length' }
    using batch = await rolled(all, without, { ...all, logProbs: [-1, NaN] }, cut)
    expect(batch.items.map(({ error }) => error?.message)).toEqual([
      undefined,
      expect.stringMatching(/perceiver gave no log-probabilities/),
      expect.stringMatching(/no log-probability of 1 of its 2 tokens/),
      undefined,
    ])
    expect(batch.items[1]!.reward).toBeNaN()
    expect([...(await batch.oldLogProbs!.read())]).toEqual([-1, -2, -1, -2])
    expect([...batch.tokens!]).toEqual([1, 2, 1, 2])
    expect(batch.metrics).toMatchObject({ errors: 2, items: 4, truncated: 1, rewardMean: 1 })

    const wrong = { ...all, logProbs: [-1] }
    using second = await rolled(all, { text: boxes('x') }, wrong, { ...without, failure: 'a call' })
    expect(second.items.map(({ error }) => error?.message)).toEqual([
      undefined,
      expect.stringMatching(/no token ids/),
      expect.stringMatching(/1 log-probabilities of 2 tokens/),
      expect.stringMatching(/perceiver gave no answer: a call/),
    ])
    expect([...second.groups]).toEqual([0])
    // A policy without any is another matter.
    using plain = await rolled(without, without, without, without)
    expect(plain.metrics.errors).toBe(0)
    expect(plain.oldLogProbs).toBeUndefined()
  })

  test('an abort rejects, and nothing leaks', async () => {
    const stop = new AbortController()
    const perceiver = functionPolicy(() => {
      stop.abort(new Error('enough'))
      return boxes('x')
    })
    const one = sample('q')
    const before = b.device.memory().liveBytes
    await expect(
      trainer({ perceiver }).rollout([one, one], { signal: stop.signal }),
    ).rejects.toThrow('enough')
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
  })

  test('items have evidence, whose images are computed on access', async () => {
    const one = sample('q')
    const before = b.device.memory().liveBytes
    const batch = await trainer({ groupSize: 8 }).rollout([one])
    const { rewards, advantages } = batch
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(
      before + rewards.byteLength + advantages.byteLength,
    )
    expect(batch.items[3]!.evidence!.crops.length).toBe(1)
    batch.dispose()
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
    expect(await one.image.read()).toHaveLength(40 * 50 * 3)
  })

  test('refuses invalid arguments', async () => {
    const wrong = (extra: object, message: RegExp) =>
      expectRefusal(() => trainer(extra), 'ERR_VALUE', 'PraGrpo', message)
    wrong({ device: 'cpu' }, /device/)
    wrong({ groupSize: 0 }, /groupSize/)
    wrong({ rounds: 0.5 }, /rounds/)
    wrong({ schedule: { perceiver: 0, reasoner: 0 } }, /schedule/)
    wrong({ schedule: { perceiver: -1, reasoner: 2 } }, /schedule.perceiver/)
    wrong({ reasoner: null }, /reasoner/)
    wrong({ step: -1 }, /step/)
    wrong({ temperature: -1 }, /temperature/)
    wrong({ estimator: 'ppo' }, /estimator/)
    wrong({ verifier: 'yes' }, /verifier must be a function/)
    wrong({ maxTokens: { reasoner: 0 } }, /maxTokens.reasoner/)
    wrong({ evidence: { padding: [0.1] } }, /padding/)
    wrong({ rules: 'lax' }, /rules/)
    wrong({ logProbsMode: 'vllm' }, /logProbsMode/)
    wrong({ prompts: { perceive: 3 } }, /prompts.perceive/)
    expectRefusal(() => paperSettings({ batch: 0 }), 'ERR_VALUE', 'paperSettings', /batch/)
    const pra = trainer({})
    await expect(pra.rollout([{ ...sample('q'), question: 3 } as never])).rejects.toMatchObject({
      code: 'ERR_VALUE',
      message: expect.stringMatching(/samples\[0\].question/),
    })
    for (const [extra, message] of [
      [{ image: b.device.zeros([4, 4]) }, /samples\[0\].image must be \[height, width, 3\]/],
      [{ answerForm: 'letter' }, /samples\[0\].answerForm/],
    ] as const)
      await expect(pra.rollout([{ ...sample('q'), ...extra } as never])).rejects.toMatchObject({
        op: 'rollout',
        message: expect.stringMatching(message),
      })
    await expect(pra.rollout('x' as never)).rejects.toMatchObject({ code: 'ERR_VALUE' })
    using batch = await pra.rollout([sample('q')])
    expectRefusal(
      () => pra.step(batch, { logProbs: b.device.zeros([4]) }),
      'ERR_POLICY',
      'step',
      /no token ids/,
    )
  })
})

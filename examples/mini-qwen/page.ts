/** A run as one self-contained HTML page: it has no script and requests nothing. */
import { curveSvg } from '../mini-p2r/curve.js'
import type { Scores } from '../mini-p2r/evaluate.js'
import { type ExampleImages, evidenceSvg } from '../mini-p2r/pictures.js'
import { type CurvePoint, type Run as DemoRun, type Example, SCORES } from '../mini-p2r/report.js'

/** An answered question: what was said, and what it is about. */
export interface Card extends Pick<Example, 'cell' | 'trueCell' | 'hit' | 'question' | 'truth'> {
  canvas: number
  box: string
  answer: string
}

/** What metrics.json holds. */
export interface Run {
  seed: number
  device: string
  split: 'test' | 'validation'
  questions: number
  parameters: number
  /** Of the wall, and of all cores. */
  seconds: { warmStart: number; policy: number; all: number; cpu: number }
  warmStart: Scores
  trained: Scores
  /** On validation questions, by updates. */
  curve: CurvePoint[]
  cards: Card[]
  settings: unknown
}

export async function page(run: Run, images: readonly ExampleImages[]): Promise<string> {
  const { seed, device, split, questions, parameters, seconds, curve, cards } = run
  const rows = SCORES.map(
    ([title, key]) =>
      `<tr><th>${title}</th><td>${run.warmStart[key].toFixed(3)}</td><td>${run.trained[key].toFixed(3)}</td></tr>`,
  )
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A miniature Qwen3-VL, seed ${seed}</title>
<link rel="icon" href="data:,">
<style>${STYLE}</style>
</head>
<body>
<h1>One digit in a megapixel, by one Qwen3-VL of ${parameters} parameters</h1>
<p>The same weights write the Perceiver's box, as text, and the Reasoner's answer to its crop. Seed ${seed},
${escaped(device)}: ${seconds.warmStart.toFixed(0)} seconds of warm start, ${seconds.policy.toFixed(0)} of PRA-GRPO.</p>
<table>
<caption>Shares of ${questions} ${split} questions, answered greedily.</caption>
<tr><td></td><th>warm start</th><th>P2R</th></tr>
${rows.join('\n')}
</table>
${curve.length > 1 ? await curveSvg({ curve, phases: [] as DemoRun['phases'] } as DemoRun) : ''}
<p>Shares of validation questions: end to end (dark), hits (blue), the Reasoner on the true crop (orange).</p>
<div class="cards">
${cards.map((card, i) => article(card, images[i] as ExampleImages)).join('\n')}
</div>
</body>
</html>
`
}

function article(card: Card, images: ExampleImages): string {
  const { question, box, answer, truth } = card
  return `<article>
<h2>${question}</h2>
${evidenceSvg(card as unknown as Example, images, question)}
<p><code>${escaped(box)}</code></p>
<p><b>${escaped(answer)}</b>, the truth is ${truth}</p>
</article>`
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}

const STYLE = `
:root { --ink: #1c1d20; --muted: #5b5e66; --line: #dfdfd9; --hit: #0b6e99; --reasoner: #b85c00;
  --perceiver-band: #e4edf5; --reasoner-band: #f8eee0; }
body { margin: 0 auto; padding: 2rem 1.25rem; max-width: 64rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); }
h1 { font-size: 1.6rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
caption { text-align: left; color: var(--muted); } th, td { padding: .3rem 1rem .3rem 0; text-align: left; font-weight: 400; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-radius: .75rem; padding: 1rem; }
article svg { width: 100%; height: auto; background: #14161a; } code { font-size: .75rem; overflow-wrap: anywhere; }
`

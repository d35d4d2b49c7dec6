import type { TopLevelSpec } from 'vega-lite'
import type { Scores } from './evaluate.js'
import { type Run, SCORES } from './report.js'
import type { Role } from './train.js'

/** Custom properties of CSS, which page.ts sets for each colour scheme. */
export const LINES: Record<keyof Scores, string> = {
  accuracy: 'var(--ink)',
  hit: 'var(--hit)',
  reasoner: 'var(--reasoner)',
}
/** The background of a phase, by the role that it trains. */
export const BANDS: Record<Role, string> = {
  perceiver: 'var(--perceiver-band)',
  reasoner: 'var(--reasoner-band)',
}

/** The three scores against policy updates, as an SVG element; the background shows the phases. */
export async function curveSvg(run: Run): Promise<string> {
  // Loaded when first used, since most of the command's start would be spent on them.
  const [{ parse, View }, { compile }] = await Promise.all([import('vega'), import('vega-lite')])
  const view = new View(parse(compile(curveSpec(run)).spec), { renderer: 'none' })
  try {
    return await view.toSVG()
  } finally {
    view.finalize()
  }
}

function curveSpec({ curve, phases }: Run): TopLevelSpec {
  const points = curve.flatMap((point) =>
    SCORES.map(([, key]) => ({ update: point.update, score: key, value: point[key] })),
  )
  let end = 0
  const bands = phases
    .filter(({ kind }) => kind === 'PRA-GRPO')
    .map(({ role, updates }) => {
      const start = end
      end += updates
      return { start, end, role }
    })
  return {
    $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
    description: 'Scores on validation questions against policy updates',
    width: 370,
    height: 250,
    background: 'transparent',
    config: {
      font: 'system-ui, sans-serif',
      axis: {
        labelColor: 'var(--muted)',
        titleColor: 'var(--muted)',
        titleFontWeight: 'normal',
        labelFontSize: 12,
        titleFontSize: 12,
        gridColor: 'var(--line)',
        domainColor: 'var(--line)',
        tickColor: 'var(--line)',
      },
      view: { stroke: 'var(--line)' },
    },
    layer: [
      {
        data: { values: bands },
        mark: { type: 'rect' },
        encoding: {
          x: { field: 'start', type: 'quantitative' },
          x2: { field: 'end' },
          color: {
            field: 'role',
            type: 'nominal',
            legend: null,
            scale: colours(BANDS),
          },
        },
      },
      {
        data: { values: points },
        mark: { type: 'line', point: { size: 22 }, strokeWidth: 2 },
        encoding: {
          x: {
            field: 'update',
            type: 'quantitative',
            title: 'policy updates',
            scale: { nice: false },
            axis: { tickCount: 6 },
          },
          y: {
            field: 'value',
            type: 'quantitative',
            title: 'share of validation questions',
            scale: { domain: [0, 1] },
            axis: { tickCount: 5 },
          },
          color: {
            field: 'score',
            type: 'nominal',
            legend: null,
            scale: colours(LINES),
          },
        },
      },
    ],
    resolve: { scale: { color: 'independent' } },
  } as TopLevelSpec
}

function colours(of: Record<string, string>): { domain: string[]; range: string[] } {
  return { domain: Object.keys(of), range: Object.values(of) }
}

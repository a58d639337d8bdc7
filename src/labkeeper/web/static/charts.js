// The charts of a server's usage over time. A table beside them has the same for screen readers.
'use strict'

{
  const charts = document.getElementById('charts')
  const REFRESH = 5000
  const GIB = 2 ** 30
  const shown = {}
  let since = '1h'

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim()

  const KINDS = {
    memory: { label: 'Memory, GiB', of: (usage) => usage.memory_max.map((v) => (v === null ? null : v / GIB)) },
    cpus: { label: 'Busy processors', of: (usage) => usage.cpus }
  }

  function options(kind, width) {
    const axis = { stroke: colour('--soft'), grid: { stroke: colour('--line'), width: 1 }, ticks: { show: false } }
    return {
      width,
      height: 170,
      title: KINDS[kind].label,
      cursor: { y: false },
      legend: { show: false },
      scales: { y: { range: (_, low, high) => [0, (high || 0.1) * 1.15] } },
      axes: [axis, { ...axis, size: 46 }],
      series: [{}, { stroke: colour('--brand'), fill: `${colour('--brand')}22`, width: 1.5, points: { show: false } }]
    }
  }

  function draw(usage) {
    const begin = Date.parse(usage.start) / 1000
    const times = usage.memory.map((_, at) => begin + at * usage.resolution)
    for (const place of charts.querySelectorAll('[data-chart]')) {
      const kind = place.dataset.chart
      const data = [times, KINDS[kind].of(usage)]
      if (!times.length) place.textContent = ''
      else if (shown[kind]) shown[kind].setData(data)
      else {
        place.textContent = ''
        shown[kind] = new uPlot(options(kind, place.clientWidth), data, place)
      }
    }
  }

  async function load() {
    if (document.hidden) return
    try {
      const answer = await fetch(`${charts.dataset.usage}?since=${since}`)
      if (answer.ok) draw(await answer.json())
    } catch {
      // The stream of the page says that the keeper does not answer.
    }
  }

  function again() {
    for (const kind of Object.keys(shown)) {
      shown[kind].destroy()
      delete shown[kind]
    }
    load()
  }

  charts.querySelector('.ranges').hidden = false
  charts.addEventListener('click', (event) => {
    if (!event.target.dataset.since) return
    since = event.target.dataset.since
    for (const button of charts.querySelectorAll('[data-since]')) {
      button.setAttribute('aria-pressed', String(button === event.target))
    }
    load()
  })
  let width = innerWidth
  addEventListener('resize', () => {
    if (innerWidth !== width) again()
    width = innerWidth
  })
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', again)
  setInterval(load, REFRESH)
  load()
}

"use strict";

const byId = (id) => document.getElementById(id);
const types = ["image/png", "image/jpeg"];
const promises = {
  fresh: "Every query meets one member, drawn anew; which one is kept secret.",
  "per-input": "A picture meets one member, the same every time; which one is kept secret.",
  "per-client": "You meet one member for a while; which one is kept secret.",
  averaged: "All members answer together: nothing is drawn.",
  member: "The first member answers: nothing is drawn.",
  research: "Research mode: the draw is seeded and shown. Never serve strangers so.",
};
let about = null;
let picture = null;
let tally = new Map();

function fail(message) {
  byId("error").textContent = message;
  byId("error").hidden = false;
}

async function post(path) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": picture.type },
    body: picture,
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function ask() {
  byId("error").hidden = true;
  byId("again").disabled = true;
  const asked = picture;
  try {
    const answer = await post(`v2/models/${encodeURIComponent(about.name)}/classify`);
    const members = about.research ? (await post("research/members")).members : [];
    if (asked === picture) show(answer, members);
  } catch (error) {
    byId("answer").hidden = true;
    byId("members").hidden = true;
    fail(error.message || "The server cannot be reached.");
  } finally {
    byId("again").disabled = false;
  }
}

function show(answer, members) {
  byId("label").textContent = answer.label;
  byId("confidence").textContent = answer.confidence;
  byId("answer").hidden = false;
  tally.set(answer.label, (tally.get(answer.label) || 0) + 1);
  const asked = [...tally.values()].reduce((sum, n) => sum + n, 0);
  const counts = [...tally].map(([label, n]) => `${label} ${n}×`).join(", ");
  byId("tally").textContent = asked > 1 ? `Asked ${asked} times: ${counts}` : "";
  if (about.research) showMembers(answer, members);
}

function showMembers(answer, members) {
  const votes = new Map();
  for (const member of members) votes.set(member.label, (votes.get(member.label) || 0) + 1);
  const [label, most] = [...votes].sort((a, b) => b[1] - a[1])[0];
  byId("agreement").textContent =
    most === members.length
      ? `All ${most} members say ${label}.`
      : `${most} of ${members.length} members say ${label}; ${votes.size} labels in all.`;
  byId("rows").replaceChildren(...members.map((member, m) => row(member, m, m === answer.member)));
  byId("members").hidden = false;
}

function row(member, m, drawn) {
  const line = document.createElement("tr");
  const probability = Math.max(...member.scores);
  const meter = document.createElement("meter");
  meter.value = probability;
  meter.textContent = probability.toFixed(2);
  const percent = ` ${(100 * probability).toFixed(1)} %`;
  const cells = [drawn ? `${m} (answered)` : `${m}`, member.label, percent];
  for (const text of cells) line.insertCell().textContent = text;
  line.cells[2].prepend(meter);
  line.classList.toggle("drawn", drawn);
  return line;
}

async function readable(file) {
  if (!types.includes(file.type)) return false;
  try {
    (await createImageBitmap(file)).close();
    return true;
  } catch {
    return false;
  }
}

async function take(file) {
  if (!file || !about) return;
  if (!(await readable(file))) {
    fail(`${file.name} is not a PNG or JPEG picture.`);
    return;
  }
  picture = file;
  tally = new Map();
  URL.revokeObjectURL(byId("preview").src);
  byId("preview").src = URL.createObjectURL(file);
  byId("preview").alt = file.name;
  byId("preview").hidden = false;
  byId("invite").hidden = true;
  ask();
}

byId("file").addEventListener("change", (event) => take(event.target.files[0]));
byId("again").addEventListener("click", ask);
// a picture dropped beside the field must not replace the page
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}

fetch("about.json")
  .then((response) => response.json())
  .then((found) => {
    about = found;
    const [channels, height, width] = about.shape;
    const kind = channels === 1 ? "grey" : "colour";
    byId("name").textContent = about.name;
    document.title = about.name;
    byId("about").textContent =
      `${about.classes.length} classes, ${about.num_members} members, ` +
      `${width} × ${height} ${kind} pixels; pictures are resized.`;
    const kept = about.mode === "sampled" ? about.policy : about.mode;
    byId("promise").textContent = promises[about.research ? "research" : kept];
  })
  .catch(() => fail("The server cannot be reached."));

"""Short stories and questions about them that a small model can answer when it has just read the story.

Written for this project, as were the questions: each is answered by one sentence of its story, in a few words that
nobody would guess. Questions that SmolLM2-135M-Instruct got wrong most of the time with the story in its window, or
right without having read it, were taken out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """
    cue        how an answer begins
    accepted   any of these, in what follows
    """

    ask: str
    cue: str
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    text: str
    questions: tuple[Question, ...]


def _question(ask: str, cue: str, *accepted: str) -> Question:
    return Question(ask, cue, accepted)


STORIES: tuple[Story, ...] = (
    Story(
        "Old Tobias kept bees behind the church of Marlow. One spring a swarm flew into the bell tower, and for "
        "three weeks nobody dared to ring the bell. In the end the baker's boy, Emil, climbed up with a pot of "
        "smoke and carried the swarm down in a flour sack. Tobias gave him a jar of honey and a silver whistle.",
        (
            _question("Into what did the swarm fly?", "The swarm flew into the", "bell tower", "tower"),
            _question(
                "In what did the baker's boy carry the swarm down?",
                "He carried the swarm down in a",
                "flour sack",
                "sack",
            ),
        ),
    ),
    Story(
        "The ferry across the river Lorne was a flat boat that belonged to a widow named Hanka. She took one copper "
        "for a man and two for a horse, and from children she took a song. When the stone bridge was built, the "
        "people thought that she would move away. But Hanka painted her boat yellow, planted beans and pumpkins in "
        "it, and sold them from the bank.",
        (
            _question(
                "To whom did the ferry across the river Lorne belong?", "The ferry belonged to a widow named", "Hanka"
            ),
            _question("What did Hanka take from children?", "From children Hanka took a", "song"),
            _question("What color did Hanka paint her boat?", "Hanka painted her boat", "yellow"),
        ),
    ),
    Story(
        "Lieutenant Varga lost his watch on the day of the great flood. Eleven years later a fisherman named Osip "
        "cut open a pike, and there it was, with the lid still closed. Osip walked four days to the garrison to "
        "bring it back. The lieutenant was a general by then. He wound up the watch, and it ran, and he gave the "
        "fisherman his own horse to ride home on.",
        (
            _question("What did Lieutenant Varga lose on the day of the flood?", "Lieutenant Varga lost his", "watch"),
            _question("Who found the watch of Lieutenant Varga?", "The watch was found by a fisherman named", "Osip"),
            _question("How long did Osip walk to the garrison?", "To the garrison Osip walked", "four days", "4 days"),
        ),
    ),
    Story(
        "In the village of Brenn there was a clockmaker called Matthias who could not sleep. Every night he walked "
        "along the wall of the old castle and counted the owls. One night there were only six instead of seven. He "
        "looked for the last one until morning and found it in the chimney of the school. From then on the children "
        "called him Uncle Owl, and he slept like a stone.",
        (
            _question("What was the clockmaker of Brenn called?", "The clockmaker of Brenn was called", "Matthias"),
            _question(
                "What did the clockmaker of Brenn count at night?", "At night the clockmaker counted the", "owls"
            ),
            _question(
                "Where did the clockmaker find the last owl?", "He found the last owl in the chimney of the", "school"
            ),
            _question("What did the children call the clockmaker?", "The children called him Uncle", "Owl"),
        ),
    ),
    Story(
        "Miss Pettigrew taught geography in Ashcombe, although she had never left the county. On her sixtieth "
        "birthday her pupils gave her a ticket to Lisbon. She came back after a month with a brown face, a green "
        "umbrella and a tortoise, which she named Magellan. The tortoise lived under the map of the world and ate "
        "the chalk.",
        (
            _question("What did Miss Pettigrew teach?", "Miss Pettigrew taught", "geography"),
            _question(
                "Where did the ticket of Miss Pettigrew go to?", "Her pupils gave Miss Pettigrew a ticket to", "Lisbon"
            ),
            _question("What did the tortoise eat?", "The tortoise ate the", "chalk"),
        ),
    ),
    Story(
        "The miners of Redgate had a lucky goat whose name was Duchess. Nobody went down before she had been led "
        "once around the shaft. One Monday she would not move, whatever they did, and so the men stayed above and "
        "grumbled. At ten o'clock the lower gallery fell in. The owner of the mine, a Mr. Calloway, had a collar of "
        "brass made for Duchess, and every Monday she got a cabbage.",
        (
            _question("Which animal did the miners of Redgate have?", "The miners of Redgate had a lucky", "goat"),
            _question("What was the name of the goat?", "The name of the goat was", "Duchess"),
            _question("What was the name of the owner of the mine?", "The owner of the mine was Mr.", "Calloway"),
            _question("What did the goat get every Monday?", "Every Monday the goat got a", "cabbage"),
        ),
    ),
    Story(
        "A pianist named Ludmila rented the room above the butcher's shop in Garden Street. She practiced at night, "
        "and the butcher, Mr. Boll, wanted to throw her out. But his customers stood in the street to listen, and "
        "bought sausages while they stood there. So Mr. Boll bought her a better piano and wrote on his window: "
        "Sausages and Sonatas.",
        (
            _question(
                "Who rented the room above the butcher's shop?", "The room was rented by a pianist named", "Ludmila"
            ),
            _question("What was the name of the butcher in Garden Street?", "The name of the butcher was Mr.", "Boll"),
            _question(
                "What did the customers of the butcher buy?", "While they listened the customers bought", "sausages"
            ),
        ),
    ),
    Story(
        "When the king of Orland grew old, he asked his three daughters to bring him the most useful thing in the "
        "world. The first brought gold, and the second brought a sword. The youngest, whose name was Isaura, "
        "brought a needle. The king laughed at her. But that winter his only coat was torn, and neither gold nor "
        "sword could mend it, and Isaura became queen.",
        (
            _question("What was the name of the youngest daughter of the king of Orland?", "Her name was", "Isaura"),
            _question("What did the youngest daughter bring to the king?", "The youngest daughter brought a", "needle"),
            _question("What was torn that winter?", "That winter the king's only", "coat"),
        ),
    ),
    Story(
        "Captain Brandt sailed the schooner Halcyon with a crew of nine and a cook who was afraid of water. The "
        "cook's name was Pim. In a storm off the Azores a wave carried the captain overboard, and it was Pim who "
        "jumped after him with a rope around his waist. When they asked him why, he said that the captain still "
        "owed him eleven guilders.",
        (
            _question("What was the name of Captain Brandt's cook?", "The name of the cook was", "Pim"),
            _question("Of what was the cook of the schooner afraid?", "The cook was afraid of", "water"),
            _question(
                "How much did the captain owe the cook?", "The captain owed the cook", "eleven guilders", "11 guilders"
            ),
        ),
    ),
    Story(
        "Nobody in Felden believed the postman Anselm when he said that there was a wolf in the church. He was "
        "known for his stories. But on Sunday the organ would not play, and the sacristan found four gray cubs "
        "asleep among the pipes. The mother had come in through the broken window behind the altar. The priest, "
        "Father Kolb, preached in the barn until May.",
        (_question("What would not play on Sunday?", "On Sunday the", "organ"),),
    ),
    Story(
        "Doctor Amari built a telescope on the roof of the hospital of Tarsa. By day he pulled teeth, and by night "
        "he looked for a comet. He found one after nineteen years, on the night when his grandson was born. He was "
        "allowed to name it, and so both of them, the comet and the boy, are called Nuri.",
        (
            _question(
                "What did Doctor Amari build on the roof of the hospital?",
                "On the roof Doctor Amari built a",
                "telescope",
            ),
            _question("What did Doctor Amari do by day?", "By day Doctor Amari pulled", "teeth"),
            _question("What did Doctor Amari look for at night?", "At night Doctor Amari looked for a", "comet"),
            _question("What is the name of Doctor Amari's grandson?", "The grandson of Doctor Amari is called", "Nuri"),
        ),
    ),
    Story(
        "The twins Berta and Bogdan inherited a mill that had no river, for the river had moved. Berta wanted to "
        "sell the stones, and Bogdan wanted to wait. They agreed to wait for seven years. In the sixth year the "
        "river came back in one night, and it brought a barge with it, loaded with barrels of salt, which lies in "
        "their garden to this day.",
        (
            _question("What did the twins Berta and Bogdan inherit?", "The twins Berta and Bogdan inherited a", "mill"),
            _question("What did Berta want to sell?", "Berta wanted to sell the", "stones"),
            _question(
                "How long did the twins agree to wait?", "The twins agreed to wait for", "seven years", "7 years"
            ),
            _question("With what was the barge loaded?", "The barge was loaded with barrels of", "salt"),
        ),
    ),
)

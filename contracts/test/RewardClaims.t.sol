// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {RewardDistributor} from "../src/RewardDistributor.sol";
import {RewardToken} from "../src/RewardToken.sol";
import {IRewardDistributor} from "../src/interfaces/IRewardDistributor.sol";
import {RewardsBase} from "./Base.sol";
import {BlacklistToken, CallbackToken, FalseToken, FeeToken, GrowingToken} from "./Doubles.sol";
import {RewardTree} from "./RewardTree.sol";
import {VM} from "./Vm.sol";

/// @dev Claims, and tokens that misbehave.
contract RewardClaimsTest is RewardsBase {
    function setUp() public {
        arrange();
    }

    function test_claim_pays_and_counts() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Claimed(alice, 600, 600);
        rewards.claim(alice, 600, proofOf(600, 400, 0));
        assertEq(token.balanceOf(alice), 600);
        assertEq(rewards.claimedOf(alice), 600);
        (uint256 total, uint256 claimed,) = rewards.totals();
        assertTrue(total == 1000 && claimed == 600);
    }

    function test_front_run_claim_pays_the_account() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        bytes32[] memory proof = proofOf(600, 400, 0);
        VM.prank(person("stranger"));
        rewards.claim(alice, 600, proof);
        assertEq(token.balanceOf(alice), 600);
        assertEq(token.balanceOf(person("stranger")), 0);
    }

    function test_double_claim_from_the_same_root() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        bytes32[] memory proof = proofOf(600, 400, 0);
        rewards.claim(alice, 600, proof);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.NothingToClaim.selector, 600, 600));
        rewards.claim(alice, 600, proof);
    }

    function test_double_claim_across_roots_pays_the_difference() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        rewards.claim(alice, 600, proofOf(600, 400, 0));
        settle(rootOf(750, 450), only(logA, 10, 20, 200));
        rewards.claim(alice, 750, proofOf(750, 450, 0));
        rewards.claim(bob, 450, proofOf(750, 450, 1)); // who missed an epoch loses nothing
        assertEq(token.balanceOf(alice), 750);
        assertEq(token.balanceOf(bob), 450);
    }

    function test_old_root_is_worth_nothing_after_a_new_one() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        bytes32[] memory old = proofOf(600, 400, 0);
        settle(rootOf(750, 450), only(logA, 10, 20, 200));
        VM.expectRevert(IRewardDistributor.InvalidProof.selector);
        rewards.claim(alice, 600, old);
    }

    function test_root_stays_claimable_while_the_next_is_pending() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        propose(rootOf(0, 1000), 1000, new IRewardDistributor.Allocation[](0));
        rewards.claim(alice, 600, proofOf(600, 400, 0));
    }

    function test_smaller_cumulative_amount_locks_nobody() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        rewards.claim(alice, 600, proofOf(600, 400, 0));
        settle(rootOf(100, 1000), only(logA, 10, 20, 100)); // alice's amount went down by mistake
        bytes32[] memory mistaken = proofOf(100, 1000, 0);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.NothingToClaim.selector, 100, 600));
        rewards.claim(alice, 100, mistaken);
        settle(rootOf(700, 400), only(logA, 20, 30, 100));
        rewards.claim(alice, 700, proofOf(700, 400, 0));
        assertEq(token.balanceOf(alice), 700);
    }

    function test_claim_of_other_amounts_or_accounts() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        bytes32[] memory proof = proofOf(600, 400, 0);
        expectInvalid(alice, 601, proof);
        expectInvalid(bob, 600, proof);
        expectInvalid(alice, 600, proofOf(600, 400, 1));
        expectInvalid(address(0), 600, proof);
    }

    function test_claim_on_another_chain_or_contract() public {
        RewardDistributor other = newDistributor(IERC20(token), log, 2);
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        bytes32[] memory proof = proofOf(600, 400, 0);
        VM.expectRevert(IRewardDistributor.InvalidProof.selector);
        other.claim(alice, 600, proof);
        VM.chainId(block.chainid + 1);
        expectInvalid(alice, 600, proof);
    }

    function test_proof_too_long_or_short() public {
        bytes32[] memory leaves = new bytes32[](4);
        for (uint256 i = 0; i < 4; ++i) {
            leaves[i] = RewardTree.leafOf(address(rewards), person(VM.toString(i)), 10 + i);
        }
        settle(RewardTree.rootOf(leaves), only(logA, 0, 10, 100));
        bytes32[] memory proof = RewardTree.proofOf(leaves, 0);
        bytes32[] memory longer = new bytes32[](3);
        (longer[0], longer[1], longer[2]) = (proof[0], proof[1], keccak256("more"));
        bytes32[] memory shorter = new bytes32[](1);
        shorter[0] = proof[1];
        expectInvalid(person("0"), 10, longer);
        expectInvalid(person("0"), 10, shorter);
        expectInvalid(person("0"), 10, new bytes32[](0));
        expectInvalid(person("0"), 10, new bytes32[](2000));
        rewards.claim(person("0"), 10, proof);
    }

    /// @dev An account and amount of 64 bytes that are an inner node's two children: hashed once it would be a leaf.
    function test_internal_node_or_64_byte_leaf_is_no_leaf() public {
        bytes32[] memory leaves = leavesOf(600, 400);
        settle(RewardTree.rootOf(leaves), only(logA, 0, 10, 1000));
        (bytes32 left, bytes32 right) = leaves[0] < leaves[1] ? (leaves[0], leaves[1]) : (leaves[1], leaves[0]);
        assertEq(keccak256(abi.encode(left, right)), rewards.root());
        expectInvalid(address(uint160(uint256(left))), uint256(right), new bytes32[](0));

        settle(keccak256(abi.encode(alice, uint256(600))), new IRewardDistributor.Allocation[](0));
        expectInvalid(alice, 600, new bytes32[](0));
        settle(
            keccak256(abi.encode(block.chainid, address(rewards), alice, uint256(600))),
            new IRewardDistributor.Allocation[](0)
        );
        expectInvalid(alice, 600, new bytes32[](0)); // hashed once
    }

    function test_tree_of_one_account() public {
        settle(RewardTree.leafOf(address(rewards), alice, 10), only(logA, 0, 10, 10));
        rewards.claim(alice, 10, new bytes32[](0));
        assertEq(token.balanceOf(alice), 10);
    }

    function test_tree_of_nobody() public {
        expectInvalid(alice, 0, new bytes32[](0));
        settle(bytes32(0), only(logA, 0, 10, 10));
        expectInvalid(alice, 10, new bytes32[](0));
    }

    function test_two_leaves_of_one_account_pay_the_larger_and_not_the_sum() public {
        bytes32[] memory leaves = new bytes32[](2);
        leaves[0] = RewardTree.leafOf(address(rewards), alice, 100);
        leaves[1] = RewardTree.leafOf(address(rewards), alice, 300);
        settle(RewardTree.rootOf(leaves), only(logA, 0, 10, 1000));
        rewards.claim(alice, 100, RewardTree.proofOf(leaves, 0));
        rewards.claim(alice, 300, RewardTree.proofOf(leaves, 1));
        assertEq(token.balanceOf(alice), 300);
    }

    function test_root_over_the_total_pays_no_more_than_the_total() public {
        settle(rootOf(600, 600), only(logA, 0, 10, 1000)); // commits 1200
        rewards.claim(alice, 600, proofOf(600, 600, 0));
        bytes32[] memory proof = proofOf(600, 600, 1);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.TotalExceeded.selector, 1200, 1000));
        rewards.claim(bob, 600, proof);
        assertEq(token.balanceOf(address(rewards)), 2 * DEPOSIT - 600);
    }

    function test_amount_near_the_greatest_integer_is_refused() public {
        settle(rootOf(type(uint256).max, 1), only(logA, 0, 10, 1000));
        bytes32[] memory proof = proofOf(type(uint256).max, 1, 0);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.TotalExceeded.selector, type(uint256).max, 1000));
        rewards.claim(alice, type(uint256).max, proof);
        rewards.claim(bob, 1, proofOf(type(uint256).max, 1, 1));
        VM.expectRevert(); // the sum of both overflows
        rewards.claim(alice, type(uint256).max, proof);
    }

    function test_token_that_keeps_a_fee_is_refused_at_deposit() public {
        useToken(address(new FeeToken()));
        VM.startPrank(payer);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.WrongAmountReceived.selector, 1000, 990));
        rewards.deposit(logA, 1000);
    }

    function test_token_that_rebases_is_refused_at_deposit() public {
        useToken(address(new GrowingToken()));
        VM.startPrank(payer);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.WrongAmountReceived.selector, 1000, 1001));
        rewards.deposit(logA, 1000);
    }

    function test_token_that_says_no_without_reverting() public {
        FalseToken refusing = new FalseToken();
        useToken(address(refusing));
        VM.startPrank(payer);
        VM.expectRevert(abi.encodeWithSelector(SafeERC20.SafeERC20FailedOperation.selector, address(refusing)));
        rewards.deposit(logA, 1000);
    }

    function test_blacklisted_recipient_holds_up_nobody_else() public {
        BlacklistToken refusing = new BlacklistToken();
        useToken(address(refusing));
        VM.prank(payer);
        rewards.deposit(logA, 1000);
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        refusing.refuse(alice, true);
        bytes32[] memory proof = proofOf(600, 400, 0);
        VM.expectRevert("refused");
        rewards.claim(alice, 600, proof);
        rewards.claim(bob, 400, proofOf(600, 400, 1));
        settle(rootOf(600, 400), new IRewardDistributor.Allocation[](0));
        refusing.refuse(alice, false);
        rewards.claim(alice, 600, proof); // and alice has lost nothing
        assertEq(refusing.balanceOf(alice), 600);
    }

    function test_token_that_calls_back_into_claim() public {
        CallbackToken calling = new CallbackToken();
        useToken(address(calling));
        VM.prank(payer);
        rewards.deposit(logA, 1000);
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        bytes32[] memory proof = proofOf(600, 400, 0);
        calling.arm(address(rewards), abi.encodeCall(rewards.claim, (alice, 600, proof)));
        rewards.claim(alice, 600, proof);
        expectCalledBackInVain(calling);
        assertEq(calling.balanceOf(alice), 600);
    }

    function test_token_that_calls_back_into_deposit() public {
        CallbackToken calling = new CallbackToken();
        useToken(address(calling));
        calling.arm(address(rewards), abi.encodeCall(rewards.deposit, (logB, 1)));
        VM.prank(payer);
        rewards.deposit(logA, 1000);
        expectCalledBackInVain(calling);
        assertEq(rewards.depositOf(logA), 1000);
        assertEq(rewards.depositOf(logB), 0);
    }

    function test_token_sent_without_deposit_belongs_to_nobody() public {
        token.mint(address(rewards), 1000);
        assertEq(rewards.depositOf(logA), DEPOSIT);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.InsufficientDeposit.selector, logA, 5001, 5000));
        propose(bytes32(0), 5001, only(logA, 0, 1, 5001));
    }

    function test_devnet_token_is_minted_by_its_owner_only() public {
        RewardToken minted = new RewardToken(alice);
        VM.expectRevert(abi.encodeWithSignature("OwnableUnauthorizedAccount(address)", address(this)));
        minted.mint(bob, 1);
        VM.prank(alice);
        minted.mint(bob, 1);
        assertEq(minted.balanceOf(bob), 1);
    }

    function test_devnet_token_permit() public {
        bytes32 typeHash =
            keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)");
        bytes32 structHash = keccak256(abi.encode(typeHash, payer, bob, 5, token.nonces(payer), block.timestamp));
        bytes32 digest = keccak256(abi.encodePacked(hex"1901", token.DOMAIN_SEPARATOR(), structHash));
        (uint8 v, bytes32 r, bytes32 s) = VM.sign(keyOf("payer"), digest);
        token.permit(payer, bob, 5, block.timestamp, v, r, s);
        assertEq(token.allowance(payer, bob), 5);
        assertEq(token.nonces(payer), 1);
    }

    function testFuzz_claims_never_pay_more_than_the_newest_amount(uint256 first, uint256 second) public {
        first = 1 + bound(first, CAP - 1);
        second = 1 + bound(second, 2 * CAP - 1);
        settle(rootOf(first, 0), only(logA, 0, 10, CAP));
        rewards.claim(alice, first, proofOf(first, 0, 0));
        settle(rootOf(second, 0), only(logA, 10, 20, CAP));
        bytes32[] memory proof = proofOf(second, 0, 0);
        try rewards.claim(alice, second, proof) {
            assertTrue(second > first);
            assertEq(token.balanceOf(alice), second);
        } catch {
            assertTrue(second <= first);
            assertEq(token.balanceOf(alice), first);
        }
    }

    function testFuzz_no_other_proof(address account, uint256 cumulative, bytes32[] calldata proof) public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        expectInvalid(account, cumulative, proof);
    }

    /// @dev A distributor with this token, of which the payer has 10000 and approved them.
    function useToken(address token_) private {
        rewards = newDistributor(IERC20(token_), log, 2);
        CallbackToken(token_).mint(payer, 10000);
        VM.prank(payer);
        IERC20(token_).approve(address(rewards), 10000);
    }

    function expectInvalid(address account, uint256 cumulative, bytes32[] memory proof) private {
        VM.expectRevert(IRewardDistributor.InvalidProof.selector);
        rewards.claim(account, cumulative, proof);
    }

    function expectCalledBackInVain(CallbackToken calling) private view {
        assertTrue(!calling.succeeded());
        assertEq(
            keccak256(calling.outcome()),
            keccak256(abi.encodeWithSelector(ReentrancyGuardTransient.ReentrancyGuardReentrantCall.selector))
        );
    }
}
